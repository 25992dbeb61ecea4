"""Peers beside torch, each used if it is installed and computes the right thing; else its row says why there is none.

pip install llama-cpp-python                              # the library ggml in it, type Q1_0
LITESPARK_BUILD_AMX=1 pip install litespark-inference     # without the variable its AMX kernels are left out
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import targets
import torch
from torch import Tensor, nn

import quantopt.nn as qnn
from quantopt.ops.weights import pack_signs

LLAMA_CPP, LITESPARK = "llama.cpp Q1_0", "Litespark"
ERROR = 2e-2  # relative: all of them round x to eight bits
Q1_0, FLOAT = 41, 0  # of enum ggml_type
GROUP = 128  # weights that share a scale in Q1_0
LITESPARK_ROWS = 64  # at most in a call: of more it computes nothing, and says nothing
MEGABYTE = 1 << 20


class NoPeer(Exception):
    """``status`` and the reason, as :func:`common.missing` takes them."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


def folder_of(package: str, name: str) -> Path:
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NoPeer("not installed", f"pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def set_system_threads() -> None:
    """torch's number of threads in the system's OpenMP: that of libraries which were not built with torch."""
    try:
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(torch.get_num_threads())
    except OSError:
        return  # no library uses it


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Of y against x weight^T in float64."""
    expected = nn.functional.linear(x.double(), weight.double())
    return float((y.double() - expected).norm() / expected.norm())


def compared(
    case: str,
    key: str,
    peer: str,
    size: int,
    min_time: float,
    make: Callable[[], dict[str, Callable[[], Any]]],
) -> list[dict[str, Any]]:
    """The row of "ours" against the fastest of the peer's functions, which ``make`` has checked."""
    target = targets.of(key, peer, size)
    try:
        functions = make()
    except NoPeer as reason:
        return [common.missing(case, peer, reason.status, str(reason), target)]
    seconds = common.compare_products(functions, min_time=min_time)
    fastest = min((name for name in seconds if name != "ours"), key=seconds.__getitem__)
    more = {} if len(seconds) == 2 else {"kernel": fastest}
    return [common.row(case, peer, seconds["ours"], seconds[fastest], target, **more)]


def packed(weight: Tensor, x: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Our layer of these weights, checked."""
    layer = qnn.BinaryLinear(weight.shape[1], weight.shape[0], bias=False, compute="int8", **options)
    group = layer.group_size or weight.shape[1]
    scale = weight.abs().unflatten(1, (-1, group))[..., 0]
    layer.set_weights(pack_signs(weight), scale if layer.group_size else scale[:, 0].contiguous(), None)
    error = relative_error(layer(x), x, weight)
    if not error <= 2.5e-2:
        raise SystemExit(f"{layer}: relative error {error}")
    return lambda: layer(x)


# ---- llama.cpp ----


class _Parameters(ctypes.Structure):  # struct ggml_init_params
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """A graph of one product x W^T in ggml, W of the type Q1_0, as its CPU backend runs it."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        folder = folder_of("llama_cpp", "llama-cpp-python") / "lib"
        try:
            self.base, self.cpu = (
                ctypes.CDLL(str(folder / f"libggml-{kind}.so")) for kind in ("base", "cpu")
            )
            self._declare()
        except (OSError, AttributeError) as error:
            raise NoPeer("failed", str(error)) from error
        if self.base.ggml_type_name(Q1_0) != b"q1_0":
            raise NoPeer("failed", "this version of ggml has no type Q1_0")
        (outputs, inputs), rows = weight.shape, x.shape[0]
        size = weight.numel() // 4 + 4 * (x.numel() + rows * outputs) + 16 * MEGABYTE
        self.context = self.base.ggml_init(_Parameters(size, None, False))
        w = self.base.ggml_new_tensor_2d(self.context, Q1_0, inputs, outputs)
        self.x = self.base.ggml_new_tensor_2d(self.context, FLOAT, inputs, rows)
        product = self.base.ggml_mul_mat(self.context, w, self.x)
        self.graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(self.graph, product)
        bits, data = self.base.ggml_get_data(w), weight.contiguous()
        self.base.ggml_quantize_chunk(Q1_0, data.data_ptr(), bits, 0, outputs, inputs, None)
        self.weight = torch.empty_like(data)  # what the type holds of it
        self.base.dequantize_row_q1_0(bits, self.weight.data_ptr(), weight.numel())
        ctypes.memmove(self.base.ggml_get_data(self.x), x.contiguous().data_ptr(), 4 * x.numel())
        floats = (ctypes.c_float * (rows * outputs)).from_address(self.base.ggml_get_data(product))
        self.y = torch.frombuffer(floats, dtype=torch.float32).view(rows, outputs)
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())

    def _declare(self) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        signatures = {
            "ggml_type_name": (ctypes.c_char_p, ctypes.c_int),
            "ggml_init": (pointer, _Parameters),
            "ggml_new_tensor_2d": (pointer, pointer, ctypes.c_int, number, number),
            "ggml_mul_mat": (pointer, pointer, pointer, pointer),
            "ggml_new_graph": (pointer, pointer),
            "ggml_build_forward_expand": (None, pointer, pointer),
            "ggml_get_data": (pointer, pointer),
            "ggml_quantize_chunk": (
                ctypes.c_size_t, ctypes.c_int, pointer, pointer, number, number, number, pointer,
            ),
            "dequantize_row_q1_0": (None, pointer, pointer, number),
            "ggml_backend_graph_compute": (ctypes.c_int, pointer, pointer),
            "ggml_backend_free": (None, pointer),
            "ggml_free": (None, pointer),
        }  # fmt: skip
        for name, (result, *arguments) in signatures.items():
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_backend_cpu_init.restype = pointer
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = (pointer, ctypes.c_int)

    def __call__(self) -> Tensor:
        if status := self.base.ggml_backend_graph_compute(self.backend, self.graph):
            raise SystemExit(f"{LLAMA_CPP}: ggml_backend_graph_compute returned {status}")
        return self.y

    def close(self) -> None:
        self.base.ggml_backend_free(self.backend)
        self.base.ggml_free(self.context)


def llama_cpp(size: int, rows: int, min_time: float) -> list[dict[str, Any]]:
    """One size x size layer of the signs and scales that ggml makes of random weights."""
    x, weight = torch.randn(rows, size), torch.randn(size, size)
    opened: list[Ggml] = []

    def make() -> dict[str, Callable[[], Any]]:
        theirs = Ggml(weight, x)
        opened.append(theirs)
        error = relative_error(theirs(), x, theirs.weight)
        if not error <= ERROR:
            raise NoPeer("failed", f"wrong: relative error {error:.3g}")
        return {"ours": packed(theirs.weight, x, scale="group", group_size=GROUP), "theirs": theirs}

    kind = f"scales of {GROUP}, int8"
    case = f"M={rows} {size}x{size}, {kind}"
    try:
        return compared(case, f"M={rows}, {kind}", LLAMA_CPP, size, min_time, make)
    finally:
        for graph in opened:
            graph.close()


# ---- Litespark ----


def litespark(size: int, rows: int, min_time: float) -> list[dict[str, Any]]:
    """One size x size layer with one scale; theirs are ternary weights, of which none is zero here."""
    x, signs = torch.randn(rows, size), torch.randn(size, size).sign()
    scale = 1 / 32
    weight = signs * scale

    def make() -> dict[str, Callable[[], Any]]:
        functions = _litespark_functions(x, signs, scale)
        for name, function in functions.items():
            error = relative_error(torch.from_numpy(function()), x, weight)
            if not error <= ERROR:
                raise NoPeer("failed", f"{name} is wrong: relative error {error:.3g}")
        return {"ours": packed(weight, x), **functions}

    case = f"M={rows} {size}x{size}, one scale, int8"
    return compared(case, f"M={rows}, one scale, int8", LITESPARK, size, min_time, make)


def _litespark_functions(x: Tensor, signs: Tensor, scale: float) -> dict[str, Callable[[], Any]]:
    """By the kernel: quantisation of x and product, as its runtime calls them."""
    import numpy as np

    folder_of("litespark_inference", "litespark-inference")
    try:
        kernel = importlib.import_module("litespark_inference.torchless.kernel")
        pack = importlib.import_module("litespark_inference.torchless.pack").pack_ternary_4_per_byte
        with_tiles = kernel.has_amx()
    except Exception as error:  # what an installation that does not fit this machine raises is its own
        raise NoPeer("failed", f"{type(error).__name__}: {error}") from error
    set_system_threads()
    rows, (outputs, inputs) = len(x), signs.shape
    values, ternary = x.numpy(), signs.to(torch.int8).numpy()
    bits = pack(ternary)
    q = np.empty((rows, inputs), np.int8)
    of_rows, y = np.empty(rows, np.float32), np.empty((rows, outputs), np.float32)

    def quantised() -> None:
        kernel.quantize_activation_batched(values, q, of_rows)

    def single() -> Any:
        kernel.matmul_packed_m1(q[0], bits, scale, kernel.quantize_activation(values[0], q[0]), y[0])
        return y

    def bytes_each() -> Any:
        of_x = kernel.quantize_activation(values[0], q[0])
        kernel.matmul_unpacked_m1(q[0], unpacked, scale, of_x, y[0])
        return y

    def batched(product: Callable[..., Any], weights: Any) -> Any:
        quantised()
        for first in range(0, rows, LITESPARK_ROWS):
            part = slice(first, first + LITESPARK_ROWS)
            product(q[part], of_rows[part], weights, scale, y[part])
        return y

    if rows == 1:
        unpacked = (ternary + 1).astype(np.uint8)
        return {"packed": single, "a byte for each weight": bytes_each}
    functions: dict[str, Callable[[], Any]] = {"packed": lambda: batched(kernel.matmul_packed_mT, bits)}
    if with_tiles and rows % 16 == 0:
        tiles = np.empty((inputs // 4, outputs, 4), np.int8)
        kernel.transpose_packed_to_amx_vnni(bits, tiles, outputs, inputs)
        functions["AMX tiles, a byte for each weight"] = lambda: batched(kernel.matmul_amx_mT_padded, tiles)
    return functions
