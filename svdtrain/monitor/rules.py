"""The alert rules: pure functions from what is known of a run to findings, in training and in the monitor alike.

Every check gets `active`, whether its alert is up already, and then answers by its lower release threshold: an alert
stays up until things are clearly better (hysteresis). `--explain RULE` prints the text given here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from svdtrain.monitor import checks_run, checks_spectral
from svdtrain.monitor.findings import CRITICAL, INFO, WARNING, Finding, Situation


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What an alert means and asks."""

    name: str
    level: str
    """As a rule; `checkpoint` takes over the level it was told."""
    fires: str
    resolves: str
    meaning: str
    to_do: str

    def explain(self) -> str:
        """The text of --explain."""
        return "\n".join(
            (
                f"{self.name} ({self.level})",
                f"  fires     {self.fires}",
                f"  resolves  {self.resolves}",
                f"  meaning   {self.meaning}",
                f"  to do     {self.to_do}",
            )
        )


@dataclass(frozen=True, kw_only=True)
class Rule(Explanation):
    """A named condition."""

    check: Callable[[Situation, bool], Finding | None]


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="non_finite",
            level=CRITICAL,
            check=checks_run.non_finite,
            fires="loss, gradient norm or validation loss was nan or inf in the last 20 steps",
            resolves="50 clean steps",
            meaning="The step was not taken. One such step is harmless; three in a row end the run.",
            to_do="If it repeats: lower the learning rate, switch on --clip-grad-norm, look at the data of that step.",
        ),
        Rule(
            name="crashed",
            level=CRITICAL,
            check=checks_run.crashed,
            fires="the run ended with an exception, or after three non-finite steps in a row",
            resolves="a restart",
            meaning="Nothing is training. The checkpoints up to the last save are good.",
            to_do="Read the reason, then svdtrain --config RUN/config.json --run-dir RUN --resume auto.",
        ),
        Rule(
            name="stalled",
            level=CRITICAL,
            check=checks_run.stalled,
            fires="no record for 60 s, 20 steps' time or three times the longest pause so far, whichever is longest "
            "(15 minutes before the first step)",
            resolves="the next record",
            meaning="The process hangs, was killed without a word, or the file system does not show its writes.",
            to_do="Is the process there (squeue, nvidia-smi)? A hang: py-spy dump. A kill: resume it.",
        ),
        Rule(
            name="no_progress",
            level=CRITICAL,
            check=checks_run.no_progress,
            fires="three restarts from the same step without a newer checkpoint",
            resolves="a checkpoint beyond that step",
            meaning="Every restart repeats the same work and dies before it can save.",
            to_do="Stop requeueing. Save more often (--save-every) or find out why it dies.",
        ),
        Rule(
            name="switch_now",
            level=CRITICAL,
            check=checks_spectral.switch_now,
            fires="the newest analysis switched matrices to low-rank training with reason gradient_clobbering_risk",
            resolves="an analysis interval without such a switch, twice over",
            meaning="What these matrices were about to do lay in their principal directions more than it may. They now "
            "train their minor directions only.",
            to_do="Nothing: the method acted. Look at what changed in the data if many matrices switch at once.",
        ),
        Rule(
            name="over_limit",
            level=CRITICAL,
            check=checks_spectral.over_limit,
            fires="a matrix in full mode lies beyond a limit of the policy (see the limits in docs/MONITORING.md)",
            resolves="half a margin below the limit",
            meaning="The policy would switch it, but is switched off, or waits (dwell, evidence too weak).",
            to_do="With --no-svd-switching: decide yourself. Otherwise the next analysis decides.",
        ),
        Rule(
            name="switch_imminent",
            level=CRITICAL,
            check=checks_spectral.switch_imminent,
            fires="the trend of the last analyses (slope over 2.5 standard errors) crosses a limit within one interval",
            resolves="a trend that is two intervals away, or weaker than 1.5 standard errors",
            meaning="The next analysis will probably switch the matrix.",
            to_do="Nothing, unless you want a checkpoint from before the switch.",
        ),
        Rule(
            name="near_limit",
            level=WARNING,
            check=checks_spectral.near_limit,
            fires="a matrix in full mode is within .05 of a limit (shares), or within 5 % of it (lifts, ratios)",
            resolves="one and a half margins away",
            meaning="Close, with or without a trend.",
            to_do="Watch it: svd-monitor --layers NAME --metric METRIC.",
        ),
        Rule(
            name="flapping",
            level=WARNING,
            check=checks_spectral.flapping,
            fires="a matrix changed its mode four times within 12 analyses",
            resolves="fewer than three changes within 12 analyses",
            meaning="The metric wanders around its limit; every change costs optimizer momentum.",
            to_do="Use the calibrated rule with a longer dwell, or the conservative preset.",
        ),
        Rule(
            name="loss_shift",
            level=WARNING,
            check=checks_run.loss_shift,
            fires="the mean of the last 10 training losses is over 5 standard errors above the median of the 50 before",
            resolves="below 3",
            meaning="The data changed, or training is becoming unstable. Of all cheap statistics this announces a "
            "shift of the data best.",
            to_do="Compare with grad_norm_jump and val_rising. A new data source at this step explains it.",
        ),
        Rule(
            name="grad_norm_jump",
            level=WARNING,
            check=checks_run.gradient_jump,
            fires="the mean of the last 10 gradient norms is over 6 standard errors above the median of the 50 before",
            resolves="below 3",
            meaning="As loss_shift, often earlier.",
            to_do="As loss_shift; if the loss follows, lower the learning rate or clip.",
        ),
        Rule(
            name="val_rising",
            level=WARNING,
            check=checks_run.validation_rising,
            fires="validation bits per byte are 2 % above their best",
            resolves="within .5 % of the best",
            meaning="The model gets worse on text like its training text: divergence, or forgetting.",
            to_do="Look at the loss. If training falls while validation rises, the corpus is too small.",
        ),
        Rule(
            name="throughput",
            level=WARNING,
            check=checks_run.throughput,
            fires="the median of the last 20 steps is 20 % below this process' usual tokens per second",
            resolves="within 10 %",
            meaning="Somebody else uses the machine, the data comes too slowly, or a GPU throttles.",
            to_do="nvidia-smi (clocks, temperature), top, the file system.",
        ),
        Rule(
            name="checkpoint",
            level=WARNING,
            check=checks_run.checkpoint,
            fires="the run could not save, or resumed from an older checkpoint because a newer one was damaged",
            resolves="the next durable checkpoint",
            meaning="A crash now costs more steps than you planned.",
            to_do="Look for a full disk or quota.",
        ),
        Rule(
            name="two_writers",
            level=WARNING,
            check=checks_run.two_writers,
            fires="records of an older process arrive after a restart",
            resolves="never; the log keeps both",
            meaning="Two processes write to one run directory. The monitor counts only the newest.",
            to_do="Stop the older one, or the two overwrite each other's checkpoints.",
        ),
        Rule(
            name="trend",
            level=INFO,
            check=checks_spectral.trend,
            fires="a matrix moves towards a limit (slope over 3 standard errors) and would be there in 20 intervals",
            resolves="slope below 2 standard errors, or further away",
            meaning="A forecast, not a fact.",
            to_do="Nothing.",
        ),
        Rule(
            name="back_to_full",
            level=INFO,
            check=checks_spectral.back_to_full,
            fires="the newest analysis switched matrices back to full training",
            resolves="the next analysis without such a switch",
            meaning="The danger is over, or the rank no longer holds the matrix.",
            to_do="Nothing.",
        ),
        Rule(
            name="restarted",
            level=INFO,
            check=checks_run.restarted,
            fires="the run went on from a checkpoint less than 50 steps ago",
            resolves="50 steps later",
            meaning="Preempted and requeued, or resumed by hand.",
            to_do="Nothing.",
        ),
        Rule(
            name="unreadable",
            level=INFO,
            check=checks_run.unreadable,
            fires="lines of the log are no records",
            resolves="never",
            meaning="A process was killed while writing, or the disk was full. The other records count.",
            to_do="Nothing, if it is one line a kill.",
        ),
    )
}


def evaluate(situation: Situation, active: Collection[str] = ()) -> dict[str, Finding]:
    """Every rule that holds, by name; `active` are the rules whose alerts are up."""
    checked = ((name, rule.check(situation, name in active)) for name, rule in RULES.items())
    return {name: finding for name, finding in checked if finding is not None}
