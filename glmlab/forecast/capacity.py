"""How long a context fits on a card: one turn that goes on until the card or the model ends it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from glmlab.core.units import MIB
from glmlab.forecast.workload import DEFAULT_PROMPT, ForecastError

if TYPE_CHECKING:
    from glmlab.forecast.forecast import Forecast


@dataclass(frozen=True)
class Capacity:
    """How far a card goes: the longest context that fits, and what ends it."""

    card: str
    context_tokens: int  # 0: not even a short prompt fits
    limited_by: str  # "memory", "model" or "cache" (static_tokens)
    message: str  # the out-of-memory error, or what the limit is
    used_mib: float | None  # at that context; None where nothing fits

    @property
    def fits(self) -> bool:
        """Whether the model fits at all."""
        return self.context_tokens > 0

    def __str__(self) -> str:
        if self.used_mib is None:
            return f"{self.card}: does not fit; {self.message}"
        return f"{self.card}: {self.context_tokens:,} tokens ({self.used_mib:,.0f} MiB), limited by {self.limited_by}"


def largest_context(forecast: "Forecast") -> Capacity:
    """The longest context that fits on a forecast's card; :meth:`Forecast.largest_context` documents it."""
    workload = forecast.workload
    if workload.card is None:
        raise ForecastError("no card is given. Name one of data/gpus.csv, such as 'RTX 4060'.")
    is_open = workload.cache == "static" and not workload.static_tokens
    shortest_tokens = DEFAULT_PROMPT
    if is_open:
        from glmlab.tracing.tracer import LONGEST  # the shortest static cache that can be traced; loads torch

        shortest_tokens = LONGEST
    shortest = forecast.replace(tokens=shortest_tokens)
    facts = shortest.trace.facts
    if not facts.context_limit:
        raise ForecastError(f"{workload.name} states no context limit to search up to. Give turns instead.")
    limit = min(facts.context_limit, facts.longest_context or facts.context_limit)
    longest = shortest.replace(tokens=min(limit, workload.static_tokens or limit))
    if is_open and longest.replay.out_of_memory:
        return _longest_static_cache(shortest, longest)
    return _capacity(longest)


def _capacity(forecast: "Forecast") -> Capacity:
    """How far a single turn comes."""
    workload, facts, reached = forecast.workload, forecast.trace.facts, forecast.reached
    card = workload.card.name if workload.card else ""
    failure = forecast.replay.out_of_memory
    if len(forecast.steps) < 2:
        return Capacity(card, 0, "memory", str(failure), None)
    used_mib = float(forecast.replay.reserved[forecast.steps[-1]] / MIB + forecast.context[0])
    if failure:
        limit, message = "memory", str(failure)
    elif workload.static_tokens == reached < facts.context_limit:
        limit, message = "cache", f"static_tokens={reached}"
    elif reached == facts.longest_context:
        limit, message = (
            "model",
            f"beyond {reached:,} tokens the model's sliding window drops some, which is not forecast",
        )
    else:
        limit, message = "model", f"the model is made for {reached:,} tokens"
    return Capacity(card, reached, limit, message, used_mib)


def _longest_static_cache(fits: "Forecast", fails: "Forecast") -> Capacity:
    """Halve the interval between a static cache that fits and one that does not, until they are one token apart."""
    if fits.replay.out_of_memory:
        return _capacity(fits)
    low, high = fits.workload.context_tokens, fails.workload.context_tokens
    while high - low > 1:
        tried = fits.replace(tokens=(low + high) // 2)
        if tried.replay.out_of_memory:
            fails, high = tried, tried.workload.context_tokens
        else:
            fits, low = tried, tried.workload.context_tokens
    return replace(_capacity(fits), limited_by="memory", message=str(fails.replay.out_of_memory))
