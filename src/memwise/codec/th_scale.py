"""Factors that coordinates share, in torch: found block by block, laid out block by block.

Shapes: x is seen as n rows of d coordinates, N = n d, and comes in flat, (N,).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from memwise.codec.spec import BLOCK, Block, Scale, Spec, blocks
from memwise.codec.th_pack import Tensor, Work
from memwise.errors import InvalidKnob

_VECTORS = 64  # numbers that torch takes at once, or a multiple
# Largest over least magnitude that a grid resolves, for the power of `expand`: for minifloats as
# COAT counts it, otherwise the largest level over the least above zero.
RANGES = {"e4m3": 448**2 / 2, "e5m2": 57344**2 / 2, "dyn8": 1 / 5.5e-7, "dyn4": 1 / 5.5e-3}
POWER_STEP = 1 / 16
POWER_MOST = 128.0  # in sixteenths still exact in half precision

_STORED = {"f4": torch.float32, "f2": torch.float16}


def find(spec: Spec, x: Tensor, shape: Sequence[int], peak: float) -> dict[str, Tensor]:
    """The factors for `x` (N,) of `shape`, as they are stored.

    Args:
        spec: the codec.
        x: coordinates, of any floating type.
        shape: shape of the tensor, the last axis being the row.
        peak: what the largest magnitude is divided down to.

    Raises:
        InvalidKnob: if a coordinate is NaN, infinite, or beyond what the codec stores.
    """
    stored = spec.scales(shape)
    if spec.grid.affine:
        return _affine(spec, x, shape, peak)
    if spec.grid.name == "sign" and spec.rounding.kind == "nearest" and spec.scale.kind != "none":
        total = _statistic(spec.scale, x, shape, "sum")
        mean = total / _counts(spec.scale, shape, x.device)
        _require_finite(spec, mean)
        return {"scale": _store(spec, mean.float())}
    largest = _statistic(spec.scale, x, shape, "largest")
    _require_finite(spec, largest)
    if spec.grid.name.startswith("linear"):
        _require_positive(spec, x)
    if spec.scale.kind == "expand":
        return _expand(spec, x, shape, largest, peak)
    if "scale" not in stored:
        return {}
    if spec.scale.kind == "rank1":
        peak = 1.0  # the least of two factors is taken first, and divided by the peak then
    return {"scale": _store(spec, for_peak(spec, largest, peak))}


def renew(spec: Spec, arrays: Mapping[str, Tensor], block: Block, x: Tensor, peak: float) -> None:
    """Writes the factors of the rows x (r, w) alone; x is finite and no group is cut.

    Factors that other rows share, those of rank1, stay as they are.
    """
    kind, group = spec.scale.kind, spec.scale.group
    if kind in ("none", "rank1"):
        return
    place = block.rows
    if kind != "row":
        place = slice(block.start // group, -(-(block.start + block.size) // group))
    for name, fresh in find(spec, x.view(-1), x.shape, peak).items():
        arrays[name][place] = fresh


def for_peak(spec: Spec, largest: Tensor, peak: float) -> Tensor:
    """Factors that bring the largest magnitudes to the peak of the grid."""
    # A tensor, as a number would be turned into its reciprocal on some devices.
    wanted = largest if peak == 1 else largest / largest.new_tensor(peak)
    return torch.where(largest > 0, _normal(spec, wanted), _zero(spec))


def divisors(spec: Spec, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored factors with 1 for 0, as zeros are divided by what comes back as zero."""
    scale = arrays.get("scale")
    if scale is None or not keeps_zero_scale(spec):
        return dict(arrays)
    return {**arrays, "scale": scale.masked_fill(scale == 0, 1)}


def divide(
    spec: Spec,
    arrays: Mapping[str, Tensor],
    shape: Sequence[int],
    block: Block,
    work: Work,
    peak: float,
) -> None:
    """Scales the coordinates of a block, in place in `work.y`, to the range of the grid.

    Args:
        spec: the codec.
        arrays: its `divisors`.
        shape: shape of the whole tensor.
        block: where the coordinates lie in it.
        work: scratch, cut to the block.
        peak: what the largest magnitude is divided down to.
    """
    if spec.scale.kind == "none":
        return
    y, factor = _laid_out(spec, shape, block, work.y, work.other)
    if spec.grid.affine:
        y.sub_(factor(arrays["zero"]))
    if spec.scale.kind == "expand":
        sign = torch.signbit(y)
        y.abs_().div_(factor(arrays["centre"]))
        _raise(y, factor(arrays["power"]), work.other)
        torch.where(sign, -y, y, out=y)
    scale = factor(arrays["scale"])
    if spec.scale.kind == "rank1" and peak != 1:
        scale = scale.div_(scale.new_tensor(peak))
    y.div_(scale)


def multiply(
    spec: Spec,
    arrays: Mapping[str, Tensor],
    shape: Sequence[int],
    block: Block,
    levels: Tensor,
    scratch: Tensor,
    peak: float,
) -> None:
    """Undoes `divide` for levels (r, w), in place; `scratch` has the size of the block."""
    if spec.scale.kind == "none":
        return
    y, factor = _laid_out(spec, shape, block, levels, scratch)
    scale = factor(arrays["scale"])
    if spec.scale.kind == "rank1" and peak != 1:
        scale = scale.div_(scale.new_tensor(peak))
    y.mul_(scale)
    if spec.grid.affine:
        y.add_(factor(arrays["zero"]))
    if spec.scale.kind == "expand":
        sign = torch.signbit(y)
        _raise(y.abs_(), factor(arrays["power"]).reciprocal(), scratch)
        y.mul_(factor(arrays["centre"]))
        torch.where(sign, -y, y, out=y)


def _raise(y: Tensor, power: Tensor, scratch: Tensor) -> None:
    """Raise y to a power that broadcasts to it, in place; the same bits wherever a number lies.

    torch takes several vectors of numbers at once, and what is left at the end by another routine,
    whose last bit differs. So the end is filled up to whole vectors.
    """
    spread = scratch[: y.numel()].view(y.shape).copy_(power).view(-1)
    flat = y.contiguous().view(-1)
    n_whole = flat.numel() // _VECTORS * _VECTORS
    flat[:n_whole].pow_(spread[:n_whole])
    if rest := flat.numel() - n_whole:
        end, powers = torch.ones(2, _VECTORS, dtype=y.dtype, device=y.device)
        end[:rest], powers[:rest] = flat[n_whole:], spread[n_whole:]
        flat[n_whole:] = end.pow_(powers)[:rest]
    if not y.is_contiguous():
        y.copy_(flat.view(y.shape))


def keeps_zero_scale(spec: Spec) -> bool:
    """Whether zeros come back through a factor of zero, as no level is zero or none is shared."""
    return spec.scale.kind == "rank1" or not spec.grid.has_zero


def _laid_out(
    spec: Spec, shape: Sequence[int], block: Block, y: Tensor, out: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A view of the block, and what gives the factors that go with it; `out` is scratch for them.

    Whole groups are seen as rows, so that their factors need not be spread over a block.
    """
    group = spec.scale.group
    if group and y.is_contiguous() and not block.start % group and not block.size % group:
        groups = slice(block.start // group, (block.start + block.size) // group)
        return y.view(-1, group), lambda factors: factors[groups].float()[:, None]
    matrix = y.view(block.n_rows, block.width)
    return matrix, lambda factors: _factor(spec, factors, shape, block, out)


def _factor(spec: Spec, scale: Tensor, shape: Sequence[int], block: Block, out: Tensor) -> Tensor:
    """The factors of a block, (r, w) or what broadcasts to it; `out` is scratch for them."""
    match spec.scale.kind:
        case "tensor":
            return scale.float().view(1, 1)
        case "row":
            return scale[block.rows].float()[:, None]
        case "column":
            return scale[block.columns].float()[None]
        case "rank1":
            *ahead, columns = torch.split(scale.float(), list(shape))
            rows = _least_of_rows(ahead, shape, block)[:, None]
            both = out.view(block.n_rows, block.width)
            return torch.minimum(rows, columns[block.columns][None], out=both)
    for part, groups in _runs(block, spec.scale.group):
        out[part].view(groups.stop - groups.start, -1).copy_(scale[groups][:, None])
    return out.view(block.n_rows, block.width)


def _statistic(scale: Scale, x: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """One statistic for every factor: largest or least magnitude above zero, top, bottom, sum."""
    prepare, reduce, combine, start = _STATISTICS[name]
    kind = torch.float64 if name == "sum" else torch.float32
    n_rows, width = math.prod(shape[:-1]), shape[-1]
    rank1 = scale.kind == "rank1"
    count = {"none": 1, "tensor": 1, "row": n_rows, "column": width, "rank1": n_rows + width}.get(
        scale.kind, -(-n_rows * width // max(scale.group, 1))
    )
    found = torch.full((count,), start, dtype=kind, device=x.device)
    scratch = torch.empty(min(x.numel(), BLOCK), dtype=torch.float32, device=x.device)
    for block in blocks(n_rows, width):
        y = scratch[: block.size]
        prepare(y.copy_(x[block.flat]))
        for matrix, place, axis in _shares(scale, block, y, n_rows):
            combine(found[place], reduce(matrix, axis, kind), out=found[place])
    return _per_axis(found, shape) if rank1 else found


def _shares(
    scale: Scale, block: Block, y: Tensor, n_rows: int
) -> Iterator[tuple[Tensor, slice, int]]:
    """Views of a block with the factors they share and the axis that those run over."""
    matrix = y.view(block.n_rows, block.width)
    match scale.kind:
        case "none" | "tensor":
            yield y.view(1, -1), slice(0, 1), 1
        case "row":
            yield matrix, block.rows, 1
        case "column":
            yield matrix, block.columns, 0
        case "rank1":
            yield matrix, block.rows, 1
            yield matrix, slice(n_rows + block.column, n_rows + block.columns.stop), 0
        case _:
            for part, groups in _runs(block, scale.group):
                yield y[part].view(groups.stop - groups.start, -1), groups, 1


def _runs(block: Block, group: int) -> Iterator[tuple[slice, slice]]:
    """A block as runs of equal groups: the rest of one, whole ones, the beginning of one."""
    at, end = 0, block.size
    while at < end:
        first, gone = divmod(block.start + at, group)
        n_whole = 0 if gone else (end - at) // group
        step = n_whole * group if n_whole else min(group - gone, end - at)
        yield slice(at, at + step), slice(first, first + max(n_whole, 1))
        at += step


def _per_axis(found: Tensor, shape: Sequence[int]) -> Tensor:
    """Largest magnitudes of rows and columns as those of all axes, one after another."""
    rows, columns = torch.split(found, [len(found) - shape[-1], shape[-1]])
    axes = range(len(shape) - 1)
    if len(axes) == 1 or not rows.numel():
        return torch.cat([rows.new_zeros(sum(shape[:-1])) if len(axes) > 1 else rows, columns])
    rows = rows.view(*shape[:-1])
    return torch.cat([*(rows.amax([a for a in axes if a != axis]) for axis in axes), columns])


def _least_of_rows(ahead: Sequence[Tensor], shape: Sequence[int], block: Block) -> Tensor:
    """The least factor of the axes before the last, for every row of a block."""
    place = torch.arange(block.first, block.rows.stop, device=ahead[0].device)
    least: Tensor | None = None
    for factors, size in zip(reversed(ahead), reversed(shape[:-1]), strict=True):
        own = factors[place % size]
        least = own if least is None else torch.minimum(least, own)
        place = place // size
    assert least is not None
    return least


def _counts(scale: Scale, shape: Sequence[int], device: torch.device) -> Tensor:
    """How many coordinates share each factor, at least one, in float64."""
    n_rows, width = math.prod(shape[:-1]), shape[-1]
    total = n_rows * width
    n_each = {"tensor": total, "row": width, "column": n_rows}.get(scale.kind, scale.group)
    n_factors = {"tensor": 1, "row": n_rows, "column": width}.get(
        scale.kind, -(-total // max(scale.group, 1))
    )
    counts = torch.full((n_factors,), max(n_each, 1), dtype=torch.float64, device=device)
    if scale.kind == "group" and total % scale.group:
        counts[-1] = total % scale.group
    return counts


def _affine(spec: Spec, x: Tensor, shape: Sequence[int], peak: float) -> dict[str, Tensor]:
    """Zero point and step: codes count from the least coordinate up to the largest."""
    bottom, top = (_statistic(spec.scale, x, shape, name) for name in ("bottom", "top"))
    if not x.numel():
        bottom, top = torch.zeros_like(bottom), torch.zeros_like(top)
    _require_finite(spec, top - bottom)
    zero = _store(spec, bottom)
    step = ((top.double() - zero.double()) / peak).float()
    return {
        "scale": _store(spec, torch.where(step > 0, _normal(spec, step), 1)),
        "zero": zero,
    }


def _expand(
    spec: Spec, x: Tensor, shape: Sequence[int], largest: Tensor, peak: float
) -> dict[str, Tensor]:
    """Scale, power and centre of COAT's expansion (arXiv 2410.19313, section 4.2).

    Note: the centre is sqrt(max) sqrt(min), as max times min of second moments underflows; the
    power is cut at 128, which is only reached where all magnitudes of a group are alike.
    """
    high = largest.double()
    low = torch.minimum(_statistic(spec.scale, x, shape, "least").double(), high)
    held = RANGES.get(spec.grid.name, peak if peak > 1 else 2.0**spec.grid.bits)
    # k = floor(16 log2(range) / log2(R)) / 16 with R = max / min, and |x / centre|^k is stored.
    spread = high.log2() - low.log2()
    power = (math.log2(held) / spread / POWER_STEP).floor() * POWER_STEP
    alive = high > 0
    power = torch.where(alive, power.clamp(POWER_STEP, POWER_MOST), 1).float()
    centre = torch.where(alive, high.sqrt() * low.sqrt(), 1).float()
    wanted = ((high / centre.double()) ** power.double() / peak).float()
    return {
        "scale": _store(spec, torch.where(alive, _normal(spec, wanted), _zero(spec))),
        "power": power.to(_STORED[spec.scales(shape)["power"].dtype]),
        "centre": centre,
    }


def _zero(spec: Spec) -> float:
    """The factor of a share of zeros."""
    return 0.0 if keeps_zero_scale(spec) else 1.0


def _normal(spec: Spec, scale: Tensor) -> Tensor:
    """Lifts subnormal factors, which are too coarse to divide by."""
    return scale.clamp(min=torch.finfo(_dtype(spec)).tiny)


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float16 if spec.scale.dtype == "f16" else torch.float32


def _store(spec: Spec, scale: Tensor) -> Tensor:
    """The factors in the type that is kept."""
    kept = scale.to(_dtype(spec))
    if not bool(kept.isfinite().all()):
        raise InvalidKnob(
            f"codec {spec.name!r}: {float(scale.abs().max()):g} is too large for half precision "
            "(65504); scale the input or store f32"
        )
    return kept


def _require_finite(spec: Spec, found: Tensor) -> None:
    """Refuses what no code can hold; statistics of NaN or infinity are not finite."""
    if not bool(found.isfinite().all()):
        raise InvalidKnob(f"codec {spec.name!r} got NaN or infinity; clean the input first")


def _require_positive(spec: Spec, x: Tensor) -> None:
    """Refuses numbers below zero, for which the linear grids have no level."""
    bottom = _statistic(Scale("tensor"), x, (1, x.numel()), "bottom")
    if bool((bottom < 0).any()):
        raise InvalidKnob(
            f"codec {spec.name!r} stores numbers from zero up, got {float(bottom):g}; "
            "take a signed grid such as dyn4"
        )


def _above_zero(y: Tensor) -> Tensor:
    return y.abs_().masked_fill_(y == 0, math.inf)


_Statistic = tuple[
    Callable[[Tensor], Tensor],
    Callable[[Tensor, int, torch.dtype], Tensor],
    Callable[..., Tensor],
    float,
]
_STATISTICS: dict[str, _Statistic] = {
    "largest": (torch.Tensor.abs_, lambda y, axis, _: y.amax(axis), torch.maximum, 0.0),
    "least": (_above_zero, lambda y, axis, _: y.amin(axis), torch.minimum, math.inf),
    "top": (lambda y: y, lambda y, axis, _: y.amax(axis), torch.maximum, -math.inf),
    "bottom": (lambda y: y, lambda y, axis, _: y.amin(axis), torch.minimum, math.inf),
    "sum": (
        torch.Tensor.abs_,
        lambda y, axis, kind: y.sum(axis, dtype=kind),
        torch.add,
        0.0,
    ),
}
