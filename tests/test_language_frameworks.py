"""Language models under transformers' Trainer, accelerate and Lightning, stopped and resumed: as the uninterrupted run.

tests/test_frameworks.py has when each of them steps, saves and loads the anneal.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from language_models import logits, make  # noqa: E402
from quantopt.integrations.transformers import AnnealCallback, save_pretrained  # noqa: E402

STEPS, STOP = 50, 25
KINDS = {
    "LlamaForCausalLM": (STEPS, STOP),
    "Qwen3ForCausalLM": (6, 3),
    "GPT2LMHead": (6, 3),  # with dropout, as BERT
    "BertForMaskedLM": (6, 3),
}


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """The Trainer collects garbage at the beginning of each training, half a second among all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def texts(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 48, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def start(kind: str = "LlamaForCausalLM") -> tuple[Any, quantopt.AskewAdam]:
    torch.manual_seed(0)
    model = make(kind).train()
    groups = quantopt.param_groups(
        model, scale="tensor" if kind == "GPT2LMHead" else "channel", other={"lr": 0.01}
    )
    return model, quantopt.AskewAdam(groups, lr=0.05, memory=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def finished(model: Any, opt: Any, folder: Path) -> None:
    """The intervals are closed, and the packed model has the projected logits, before and after it is saved."""
    assert opt.param_groups[0]["epsilon"] == 0.0
    model.eval()
    with opt.quantized():
        expected = logits(model)
    packed = quantopt.pack(model, opt)
    torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=1e-4)
    save_pretrained(packed, folder / "packed")
    loaded = type(model).from_pretrained(folder / "packed")
    assert torch.equal(logits(loaded), logits(packed))


def trained(
    kind: str, folder: Path, resume: bool = False, **options: Any
) -> tuple[Any, Any, list[dict[str, Any]]]:
    model, opt = start(kind)
    steps, stop = KINDS[kind]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=stop,
        logging_steps=max(stop // 5, 1), max_grad_norm=1.0, use_cpu=True, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=texts(), optimizers=(opt, None), callbacks=[AnnealCallback()]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, opt, trainer.state.log_history


@pytest.mark.parametrize("kind", KINDS)
def test_trainer(tmp_path: Path, kind: str) -> None:
    """With accumulation and clipping; what is logged is the same too."""
    steps, _ = KINDS[kind]
    whole, _, log = trained(kind, tmp_path)
    (tmp_path / f"checkpoint-{steps}").rename(tmp_path / "done")
    resumed, own, again = trained(kind, tmp_path, resume=True)
    assert same(whole, resumed) and not same(whole, start(kind)[0])
    finished(resumed, own, tmp_path)
    rows, others = ([row for row in rows if "loss" in row] for rows in (log, again))
    assert rows == others
    assert rows[0]["epsilon"] == 1.0 and 0 < sum(row["sign_flips"] for row in rows)
    assert {"fraction_feasible", "distance", "scale", "learning_rate", "grad_norm"} <= rows[0].keys()
    assert "epsilon" not in log[-1]  # the summary


def test_trainer_in_mixed_precision(tmp_path: Path) -> None:
    whole, opt, _ = trained("Qwen3ForCausalLM", tmp_path, bf16=True)
    (tmp_path / "checkpoint-6").rename(tmp_path / "done")
    resumed, _, _ = trained("Qwen3ForCausalLM", tmp_path, resume=True, bf16=True)
    assert same(whole, resumed)
    assert opt.param_groups[0]["epsilon"] == 0.0


def test_callback_refuses(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])

    def train(opt: Any, scheduler: Any, **options: Any) -> None:
        callback = AnnealCallback(**options)
        transformers.Trainer(
            model, arguments, train_dataset=texts(4), optimizers=(opt, scheduler), callbacks=[callback]
        ).train()

    model, opt = start()
    with pytest.raises(TypeError, match="optimizer=AdamW: Anneal drives the optimizers of quantopt only"):
        train(torch.optim.AdamW(model.parameters()), None)
    anneal = quantopt.Anneal(opt, 1)
    rate = torch.optim.lr_scheduler.ConstantLR(opt)
    for scheduler in (anneal, torch.optim.lr_scheduler.ChainedScheduler([rate, anneal])):
        with pytest.raises(ValueError, match="the scheduler of the Trainer has an Anneal already"):
            train(opt, scheduler)
    with pytest.raises(ValueError, match="end_=1: the schedule of AskewAdam has"):
        train(opt, None, end_=1)


def test_callback_with_several_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make("LlamaForCausalLM")
    groups = quantopt.param_groups(
        model, scale="channel", filter_fn=lambda _, name: 2 if "mlp" in name else 1
    )
    opt = quantopt.STAM(groups, lr=0.01)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=texts(8), optimizers=(opt, None),
        callbacks=[AnnealCallback(total_steps=2, first=0.5)],
    )  # fmt: skip
    trainer.train()
    first, last = (row for row in trainer.state.log_history if "loss" in row)
    assert (
        first["kappa_0"] == first["kappa_1"] == last["kappa_0"] == float("inf")
    )  # of an anneal of two steps
    assert {"sign_flips_0", "sign_flips_1"} < first.keys() and "kappa" not in first


def with_accelerate(folder: Path, resume: bool, precision: str, steps: int) -> tuple[Any, Any]:
    """All updates of two batches each, or those from the state in ``folder``, which the whole run saves halfway."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of a process is chosen once
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    own, opt = start()
    loader = torch.utils.data.DataLoader(texts(), 4)
    model, wrapped, anneal, loader = accelerator.prepare(own, opt, quantopt.Anneal(opt, steps), loader)
    if resume:
        accelerator.load_state(str(folder))
    while anneal.scheduler.last_step < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
                anneal.step()
                wrapped.zero_grad()
        if anneal.scheduler.last_step == steps // 2 and not resume:
            accelerator.save_state(str(folder))
    result = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return result, opt


@pytest.mark.parametrize(("precision", "steps"), [("no", STEPS), ("bf16", 10)])
def test_accelerate(tmp_path: Path, precision: str, steps: int) -> None:
    whole, _ = with_accelerate(tmp_path, False, precision, steps)
    resumed, opt = with_accelerate(tmp_path, True, precision, steps)
    assert same(whole, resumed) and not same(whole, start()[0])
    finished(resumed, opt, tmp_path)


def with_lightning(
    lightning: Any, folder: Path, resume: Path | None, precision: str, steps: int
) -> tuple[Any, Any]:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.opt = start()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.body(**batch).loss

        def configure_optimizers(self) -> Any:
            anneal = quantopt.Anneal(self.opt, steps)
            return {"optimizer": self.opt, "lr_scheduler": {"scheduler": anneal, "interval": "step"}}

    module = Module()
    checkpoints = lightning.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=steps // 2, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False, precision=precision,
        enable_model_summary=False, callbacks=[checkpoints], accumulate_grad_batches=2, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(texts(), 4), ckpt_path=resume)
    return module.body, module.opt


@pytest.mark.filterwarnings("ignore")  # its own advice
@pytest.mark.parametrize(("precision", "steps"), [("32-true", STEPS), ("bf16-mixed", 10)])
def test_lightning(tmp_path: Path, precision: str, steps: int) -> None:
    """Stopped at the end of an epoch: from the middle of one Lightning goes on with the first batches."""
    lightning = pytest.importorskip("lightning.pytorch")
    whole, _ = with_lightning(lightning, tmp_path, None, precision, steps)
    resumed, opt = with_lightning(lightning, tmp_path, tmp_path / f"step={steps // 2}.ckpt", precision, steps)
    assert same(whole, resumed) and not same(whole, start()[0])
    finished(resumed, opt, tmp_path)
