"""Running Triton kernels on the CPU: the interpreter, corrected, in forked processes of its own.

Triton 3.7.1's interpreter stores bfloat16 as uint16 and computes on those bits: sums and products are
garbage, the cast from float32 truncates. Inside `run_interpreted` bf16 is computed as on a GPU: each
operation in float32 on the values, rounded once to nearest even. A reduction or scan of a bf16 tensor raises,
since its result on a GPU depends on the order of roundings: cast to float32 first.

Not emulated: TF32 (tl.dot of float32 is exact float32), the order in which tensor cores add, races.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_b2.testing.fork import run_ranks

COMPUTING = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_dot")
"""Methods of Triton's InterpreterBuilder that compute on numbers. The last operand has the result's dtype."""
JIT_MODULES = ("triton.language", "megatron_b2.ops.triton")
"""Packages whose kernels may have been imported before the interpreter was on."""


def run_interpreted(
    fn: Callable[..., Any], *args: Any, ranks: int = 1, timeout: float = 600.0, check_overflow: bool = False
) -> Any:
    """Call `fn(*args)` in a forked process with Triton's interpreter on.

    Kernels are interpreted whether `fn` imports or defines them or megatron_b2.ops.triton is imported
    already. With several ranks `fn` runs on each of a gloo group, and the results come as a list in rank
    order. With `check_overflow` an int32 sum or product that overflows raises (twice as slow). Nothing
    changes in the calling process.
    """

    def interpreted() -> Any:
        _interpret(check_overflow)
        return fn(*args)

    results = run_ranks(ranks, interpreted, timeout=timeout)
    return results[0] if ranks == 1 else results


def decode_bf16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Values of bf16 bit patterns (uint16), exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def encode_bf16(values: NDArray[Any], *, truncate: bool = False) -> NDArray[np.uint16]:
    """Bit patterns (uint16) of float32 values rounded to bf16, ties to even, or towards zero."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).reshape(values.shape).view(np.uint32).astype(np.uint64)
    if not truncate:
        # Half a unit, less one where the last kept bit is 0: a tie then stays below the next even number.
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
    quiet_nan = np.uint16(0x7FC0)
    return np.where(np.isnan(values), quiet_nan, (bits >> 16).astype(np.uint16))


def _interpret(check_overflow: bool) -> None:
    """Turn this process into one that interprets kernels. For children only: there is no way back."""
    import triton
    from triton.runtime import interpreter

    triton.knobs.runtime.interpret = True
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        debug=check_overflow, sanitize_overflow=check_overflow
    )
    _convert_compiled_functions()
    _correct_bf16(interpreter)
    interpreter._patch_lang = _once_per_module(interpreter)


def _convert_compiled_functions() -> None:
    """Make the @triton.jit functions that exist already interpreted ones, tl.sum and the like included."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def method(function: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **kwargs)

    converted: dict[int, Any] = {}
    modules = [module for name, module in sys.modules.items() if name.startswith(JIT_MODULES)]
    for owner in [*modules, tl.tensor]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                function = converted.setdefault(id(value), InterpretedFunction(value.fn))
                setattr(owner, name, method(function) if owner is tl.tensor else function)


def _once_per_module(interpreter: ModuleType) -> Callable[[Any], Any]:
    """Triton replaces triton.language before and restores it after every call of a function, which takes
    most of the time of a small kernel; here it stays replaced."""
    replace, seen = interpreter._patch_lang, set[int]()

    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) not in seen:
            seen.add(id(fn.__globals__))
            replace(fn)
        return interpreter._LangPatchScope()

    return patch_lang


def _correct_bf16(interpreter: ModuleType) -> None:
    builder = interpreter.InterpreterBuilder
    for name in COMPUTING:
        setattr(builder, name, _on_values(interpreter, getattr(builder, name)))
    _correct_casts(interpreter)
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = _without_bf16(reduction.apply_impl)


def _on_values(interpreter: ModuleType, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the builder that computes bf16 operands in float32 and rounds the result once."""
    import triton.language as tl

    handle_type = interpreter.TensorHandle

    def is_bf16(value: Any) -> bool:
        return isinstance(value, handle_type) and value.dtype.scalar == tl.bfloat16

    def on_values(self: Any, *args: Any) -> Any:
        if not any(is_bf16(value) for value in args):
            return compute(self, *args)
        values = (handle_type(decode_bf16(arg.data), tl.float32) if is_bf16(arg) else arg for arg in args)
        result = compute(self, *values)
        last = [value for value in args if isinstance(value, handle_type)][-1]
        if result.data.dtype == np.bool_:
            return handle_type(result.data, tl.int1)
        if is_bf16(last):
            return handle_type(encode_bf16(result.data), tl.bfloat16)
        return result

    return on_values


def _correct_casts(interpreter: ModuleType) -> None:
    """Casts to and from bf16, all by way of float32 as on a GPU; constants of dtype bf16."""
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any, truncate: bool = False) -> Any:
        if source.dtype.scalar == target.scalar or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        if source.dtype.scalar == tl.bfloat16:
            return cast(self, handle_type(decode_bf16(source.data), tl.float32), target)
        return handle_type(encode_bf16(source.data.astype(np.float32), truncate=truncate), tl.bfloat16)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        pair = {source.dtype.scalar, target.scalar}
        if tl.bfloat16 in pair and not any(dtype.is_fp8() for dtype in pair):
            return cast_impl(self, source, target, truncate=rounding == ir.ROUNDING_MODE.RTZ)
        return convert(self, source, target, rounding)

    def get_bf16(self: Any, value: float) -> Any:
        return handle_type(encode_bf16(np.array([value])), tl.bfloat16)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16


def _without_bf16(reduce: Callable[..., Any]) -> Callable[..., Any]:
    import triton.language as tl

    def apply_impl(self: Any, inputs: Any) -> Any:
        if any(tensor.dtype == tl.bfloat16 for tensor in inputs):
            raise TypeError("reduction of a bf16 tensor: cast it to float32 first")
        return reduce(self, inputs)

    return apply_impl
