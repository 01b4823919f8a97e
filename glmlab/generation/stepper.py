"""A widget that walks through recorded decode steps: play, slider, previous, next.

It shows the text so far, the candidates before and behind each warper, the cache as it grows, and the time of each act.
Where the steps were recorded with their logits, two more sliders re-weigh them with another temperature and another
top-p: the model does not run again.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import pandas as pd

from glmlab.core.units import format_bytes
from glmlab.figures.style import COLORS
from glmlab.generation.decoding import DecodeStep, reweigh
from glmlab.generation.step_tables import candidates_table, steps_table, token_text


class Stepper(widgets.VBox):
    """Walk through the steps of one sequence.

    Args:
        tokenizer: of the model that made the steps.
        steps: from ``decode_steps``; a run that was interrupted will do. With ``Keep(logits=True)`` the sliders of
            temperature and top-p are there.
        candidates: how many are shown behind each warper.

    Raises:
        DecodeError: no steps, or steps without candidates (from ``steps_table``).

    Example:
        >>> from glmlab import decode_steps, load_model
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> walk = Stepper(loaded.tokenizer, list(decode_steps(loaded, [5, 6, 7], max_new_tokens=3)))
        >>> walk.next_button.click()
        >>> walk.position.value
        1
    """

    def __init__(self, tokenizer: Any, steps: Sequence[DecodeStep], *, candidates: int = 8) -> None:
        self._tokenizer, self._steps, self._candidates = tokenizer, list(steps), candidates
        self._table = steps_table(tokenizer, steps)
        self._texts = [token_text(tokenizer, step.token_id) for step in self._steps]
        last = len(self._steps) - 1
        self.play = widgets.Play(min=0, max=last, interval=700, description="play")
        self.position = widgets.IntSlider(min=0, max=last, description="step", readout=True)
        self.previous_button = widgets.Button(description="previous", icon="step-backward")
        self.next_button = widgets.Button(description="next", icon="step-forward")
        widgets.jslink((self.play, "value"), (self.position, "value"))
        self.previous_button.on_click(lambda _: self._move(-1))
        self.next_button.on_click(lambda _: self._move(+1))
        self.temperature = widgets.FloatSlider(
            value=1.0, min=0.1, max=3.0, step=0.05, description="temperature", style={"description_width": "initial"}
        )
        self.top_p = widgets.FloatSlider(value=1.0, min=0.05, max=1.0, step=0.05, description="top-p")
        self.recorded = widgets.HTML()
        self.reweighed = widgets.HTML()
        for control in (self.position, self.temperature, self.top_p):
            control.observe(lambda _: self._show(), names="value")
        rows = [widgets.HBox([self.play, self.previous_button, self.next_button, self.position]), self.recorded]
        if all(step.logits is not None for step in self._steps):
            rows += [widgets.HBox([self.temperature, self.top_p]), self.reweighed]
        super().__init__(rows)
        self._show()

    def _move(self, by: int) -> None:
        self.position.value = min(max(self.position.value + by, 0), self.position.max)

    def _show(self) -> None:
        step = self._steps[self.position.value]
        recorded = candidates_table(self._tokenizer, step.stages, chosen=step.token_id)
        self.recorded.value = "".join(
            [
                self._text_html(),
                self._facts_html(),
                _cache_html(self._table, self.position.value),
                self._panels(recorded),
            ]
        )
        if step.logits is not None:
            stages = reweigh(
                step.logits, temperature=self.temperature.value, top_p=self.top_p.value, candidates=self._candidates
            )
            table = candidates_table(self._tokenizer, stages, chosen=step.token_id)
            self.reweighed.value = "<p>The same logits, weighed anew:</p>" + self._panels(table)

    def _text_html(self) -> str:
        """The text so far, the token of this step marked."""
        *before, last = self._texts[: self.position.value + 1]
        marked = f'<mark style="background:{COLORS["kv"]};color:black">{escape(last)}</mark>'
        return f'<p style="font-size:115%">{escape("".join(before))}{marked}</p>'

    def _facts_html(self) -> str:
        line = self._table.iloc[self.position.value]
        reason = self._steps[self.position.value].stop_reason
        stop = f"stops: {reason}" if reason else "goes on"
        return (
            f"<p>step {line['step']} ({line['phase']}) &middot; fed {line['fed_tokens']} tokens behind "
            f"{line['cached_tokens']} cached &middot; probability {line['probability']:.3f}, "
            f"{line['surprisal_bits']:.2f} bits &middot; forward {line['forward_ms']:.1f} ms, choose "
            f"{line['choose_ms']:.2f} ms, stop check {line['stop_check_ms']:.2f} ms &middot; {escape(stop)}</p>"
        )

    def _panels(self, table: pd.DataFrame) -> str:
        panels = "".join(
            _panel_html(str(stage), lines.head(self._candidates)) for stage, lines in table.groupby("stage", sort=False)
        )
        return f'<div style="display:flex;flex-wrap:wrap;gap:1.2em">{panels}</div>'


def _panel_html(stage: str, lines: pd.DataFrame) -> str:
    """One stage: a bar a candidate."""
    body = "".join(
        f'<tr><td style="padding-right:.6em">{escape(text)}</td><td style="width:6em">'
        f'<div style="background:{COLORS["kv" if chosen else "allocated"]};width:{100 * probability:.1f}%;height:.8em">'
        f'</div></td><td style="text-align:right">{probability:.3f}</td></tr>'
        for text, probability, chosen in zip(lines["text"], lines["probability"], lines["chosen"], strict=True)
    )
    caption = f"{escape(stage)}: {lines['survivors'].iloc[0]:,} survive"
    return (
        f'<table style="line-height:1.5"><caption style="white-space:nowrap">{caption}</caption>'
        f"<tbody>{body}</tbody></table>"
    )


def _cache_html(table: pd.DataFrame, position: int) -> str:
    """The cache as a bar, full at the last step."""
    line = table.iloc[position]
    share = line["kv_bytes"] / table["kv_bytes"].max()
    return (
        f"<p>KV cache: {line['context_tokens']} tokens, {format_bytes(int(line['kv_bytes']))}</p>"
        f'<div style="width:24em;background:#eeeeee"><div style="background:{COLORS["kv"]};width:{100 * share:.1f}%;'
        f'height:.8em"></div></div>'
    )
