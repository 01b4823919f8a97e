"""Plates of notebooks 04 and 05: memory against context, measured, forecast and reported."""

from functools import cache
from typing import Any

from glmlab.core.curve import Curve, read_curve
from glmlab.core.resources import data_path
from glmlab.figures.forecast import component_chart, pool_map, segments_table
from glmlab.figures.memory import curves_table, memory_curve
from glmlab.figures.settings import tr
from glmlab.forecast.forecast import Forecast
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate

TRACE = "chatglm3-6b-original-int4"
TURNS = "8:418,26:259,30:497,30:491,30:501,30:501,30:501,30:525"
FULL_SIZE, PRECISIONS, TOKENS = "chatglm3-6b", ("fp16", "int8", "int4"), 8000
BEFORE_TOKENS, AFTER_TOKENS = 2040, 2060


def recorded() -> Curve:
    """The embedded model's long conversation, recorded on a CPU."""
    return read_curve(data_path("recordings", "embedded-fp32-cpu.csv"))


def reported() -> Curve:
    """What the chapter reports."""
    return read_curve(data_path("recordings", "chapter-rtx4060-laptop-int4.csv"))


@cache
def forecasts() -> tuple[Curve, ...]:
    """One long answer of ChatGLM3-6B in each precision."""
    return tuple(Forecast.of(FULL_SIZE, precision=precision, tokens=TOKENS).curve for precision in PRECISIONS)


@cache
def chapter() -> Forecast:
    """The chapter's chat."""
    return Forecast.of(trace=TRACE, turns=TURNS)


def memory_vs_context() -> Plate:
    """The recorded chat of the embedded model beside the chapter's figures."""
    curves = [recorded(), reported()]
    provenance: dict[str, Any] = {curve.kind: curve.provenance for curve in curves}
    return Plate(memory_curve(curves), curves_table(curves), provenance, caption("memory_vs_context"))


def memory_forecast() -> Plate:
    """The same, with forecasts of ChatGLM3-6B at full size."""
    curves = [recorded(), *forecasts(), reported()]
    provenance = {curve.label: curve.provenance for curve in curves}
    return Plate(memory_curve(curves), curves_table(curves), provenance, caption("memory_forecast"))


def why_the_curve_bends() -> Plate:
    """The chapter's chat by component."""
    curve = chapter().curve
    return Plate(component_chart(curve), curve.table, curve.provenance, caption("why_the_curve_bends"))


def pools_before_the_move() -> Plate:
    """The allocator's pools shortly before 2,049 tokens."""
    return _pools(BEFORE_TOKENS)


def pools_after_the_move() -> Plate:
    """The allocator's pools shortly after 2,049 tokens."""
    return _pools(AFTER_TOKENS)


def _pools(tokens: int) -> Plate:
    facts = chapter().trace.facts
    title = tr("after the step to {tokens:,} tokens", tokens=tokens)
    segments, owners = chapter().segments(tokens=tokens), chapter().trace.program.owners
    provenance = {"trace": TRACE, "model": facts.model, "turns": TURNS, "versions": facts.versions}
    return Plate(
        pool_map(segments, owners, title=title),
        segments_table(segments, owners),
        provenance,
        caption("pools", moment=title),
    )
