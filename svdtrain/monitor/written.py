"""What the alerts mean that only training writes: it saw the cause, the monitor sees no more than the record."""

from __future__ import annotations

from svdtrain.monitor.findings import CRITICAL, WARNING
from svdtrain.monitor.rules import Explanation

WRITTEN: dict[str, Explanation] = {
    text.name: text
    for text in (
        Explanation(
            name="interference",
            level=WARNING,
            fires="a measurement found the loss on first-seen text above its best by --svd-alarm-nats, and rising",
            resolves="--svd-alarm-patience measurements in a row without a rise",
            meaning="Text that was seen first is being unlearned, most of it by the matrices that are named. The "
            "actions of --svd-on-alarm are at work.",
            to_do="Nothing, if this is a change of data that you want (then --svd-on-alarm none); docs/METHOD.md.",
        ),
        Explanation(
            name="ranks_differ",
            level=CRITICAL,
            fires="the checksums of the weights are not the same on all ranks",
            resolves="never; the run stops",
            meaning="One rank computes something else: broken memory, a loop that treats ranks differently.",
            to_do="Resume from the last checkpoint on other hardware; if it comes again at the same step, it is code.",
        ),
        Explanation(
            name="svd",
            level=WARNING,
            fires="a matrix could not be analysed or switched: numbers that are not finite, no gradient, a "
            "decomposition that failed",
            resolves="the next analysis that succeeds",
            meaning="The matrix keeps its mode and its last basis; training goes on.",
            to_do="Nothing, if it is rare. Every time the same matrix: look at its gradient.",
        ),
        Explanation(
            name="checkpoint_failed",
            level=CRITICAL,
            fires="a checkpoint could not be written",
            resolves="the next one that is",
            meaning="A crash now costs all steps since the last whole checkpoint.",
            to_do="Look for a full disk or quota.",
        ),
        Explanation(
            name="no_sidecar",
            level=WARNING,
            fires="nanochat resumed from a checkpoint without svd_*.pt beside it",
            resolves="never; it is said once",
            meaning="The weights are whole, but every matrix starts in full mode and without a history.",
            to_do="Nothing, if the checkpoint was made without svdtrain. Otherwise look where the file went.",
        ),
    )
}
