"""The anneal under trainers: transformers, accelerate (one and two processes) and Lightning, interrupted and resumed.

Each has its own ideas of when a scheduler is stepped, saved and loaded. What is right is always the same: epsilon after
k updates is that of step k, and a resumed run goes on with it.
"""

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import quantopt

TOTAL = 8


def start() -> tuple[nn.Sequential, Any, quantopt.Anneal]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, memory=True)
    return model, opt, quantopt.Anneal(opt, TOTAL)


def epsilons(first: int, last: int) -> list[float]:
    """Those after the updates first..last."""
    _, opt, anneal = start()
    return [float(anneal.schedule(opt.param_groups[0], k, TOTAL)["epsilon"]) for k in range(first, last + 1)]


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator)} for _ in range(64)]


def both(opt: Any, anneal: quantopt.Anneal) -> Any:
    """With a schedule of the rate, as trainers take one scheduler."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, TOTAL)
    return torch.optim.lr_scheduler.ChainedScheduler([cosine, anneal], optimizer=opt)


@pytest.mark.parametrize("chained", [False, True])
def test_transformers(tmp_path: Path, chained: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x)
            return {"loss": y.square().mean(), "logits": y}

    def run(resume: bool) -> tuple[list[float], nn.Module, list[float]]:
        model, opt, anneal = start()
        seen: list[float] = []

        class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                seen.append(opt.param_groups[0]["epsilon"])

        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=TOTAL, gradient_accumulation_steps=2, per_device_train_batch_size=4,
            save_steps=5, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        scheduler = both(opt, anneal) if chained else anneal
        trainer = transformers.Trainer(
            Model(model), arguments, train_dataset=images(), optimizers=(opt, scheduler), callbacks=[Watch()]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.log_history[0]["learning_rate"] > 0
        return seen, model, [group["lr"] for group in opt.param_groups]

    straight, whole, rates = run(False)
    assert straight == epsilons(1, TOTAL) and straight[-1] == 0.0
    (tmp_path / f"checkpoint-{TOTAL}").rename(tmp_path / "done")
    resumed, model, resumed_rates = run(True)
    assert resumed == epsilons(6, TOTAL)
    assert rates == resumed_rates
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def accelerated(folder: Path, prepared_first: bool = False) -> list[float]:
    """Epsilon after each batch of a run whose second half goes on from a saved state; two batches to an update."""
    from accelerate import Accelerator

    def begin() -> tuple[Any, Any, Any, Any]:
        model, opt, anneal = start()
        if prepared_first:  # an Anneal of the wrapped optimizer
            model, opt = accelerator.prepare(model, opt)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return model, opt, accelerator.prepare(quantopt.Anneal(opt, TOTAL)), opt.optimizer
        return *accelerator.prepare(model, opt, anneal), opt

    seen: list[float] = []

    def batches(model: Any, opt: Any, anneal: Any, own: Any, first: int, last: int) -> None:
        for i in range(first, last):
            with accelerator.accumulate(model):
                x = torch.randn(
                    4, 6, generator=torch.Generator().manual_seed(i + 100 * accelerator.process_index)
                )
                accelerator.backward(model(x).square().mean())
                opt.step()
                anneal.step()
                opt.zero_grad()
            seen.append(own.param_groups[0]["epsilon"])

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = begin()
    batches(*parts, 0, 10)
    accelerator.save_state(str(folder))
    accelerator.free_memory()
    parts = begin()
    accelerator.load_state(str(folder))
    batches(*parts, 10, 2 * TOTAL)
    return seen


def pairs() -> list[float]:
    return [epsilons(0, TOTAL)[(i + 1) // 2] for i in range(2 * TOTAL)]


@pytest.mark.parametrize("prepared_first", [False, True])
def test_accelerate(tmp_path: Path, prepared_first: bool) -> None:
    pytest.importorskip("accelerate")
    assert accelerated(tmp_path, prepared_first) == pairs()


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    assert accelerated(Path(folder)) == pairs()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    """It calls the scheduler once for each process."""
    pytest.importorskip("accelerate")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)


def lightning_module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.opt, self.anneal = start()
            self.seen: list[float] = []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.body(batch["x"]).square().mean()

        def configure_optimizers(self) -> Any:
            config = {"scheduler": both(self.opt, self.anneal), "interval": "step"}
            return {"optimizer": self.opt, "lr_scheduler": config}

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(self.opt.param_groups[0]["epsilon"])

    return Module()


def lightning_run(lightning: Any, folder: Path, steps: int, **options: Any) -> Any:
    module = lightning_module(lightning)
    resume = options.pop("resume", None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(images(), 4), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.filterwarnings("ignore")  # its own advice
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    whole = lightning_run(lightning, tmp_path / "whole", TOTAL, accumulate_grad_batches=2)
    assert whole.seen[1::2] == epsilons(1, TOTAL) and whole.seen[-1] == 0.0
    lightning_run(lightning, tmp_path / "cut", 5, accumulate_grad_batches=2)
    resumed = lightning_run(
        lightning, tmp_path / "cut", TOTAL, accumulate_grad_batches=2, resume=tmp_path / "cut" / "last.ckpt"
    )
    assert resumed.seen[1::2] == epsilons(6, TOTAL)


@pytest.mark.filterwarnings("ignore")
def test_lightning_clips_gradients_with_mixed_precision(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    plugin = lightning.plugins.precision.MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # as for float16, which CPUs lack
    module = lightning_run(lightning, tmp_path, TOTAL, plugins=[plugin], gradient_clip_val=0.01)
    assert module.seen[-1] == 0.0


@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_that_lightning_wraps(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    seen: list[Any] = []

    class Watch(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_end(self, _: Any, module: Any) -> None:
            wrapped = module.optimizers()
            assert wrapped is not module.opt and quantopt.Anneal(wrapped, TOTAL).optimizer is module.opt
            seen.append(
                (wrapped.metrics()[0]["fraction_feasible"], module.opt.metrics()[0]["fraction_feasible"])
            )
            with wrapped.quantized():
                seen.append(module.body[2].weight.abs().unique().numel())
            wrapped.load_state_dict(module.opt.state_dict())
            assert "state" not in vars(wrapped)

    lightning_run(lightning, tmp_path, 3, callbacks=[Watch()])
    assert seen == [(1.0, 1.0), 1]
