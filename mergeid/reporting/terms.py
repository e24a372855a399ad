"""The words of the field and of mergeid, each explained in one or two plain sentences."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mergeid.errors import MergeidError


@dataclass(frozen=True)
class Term:
    """Attributes:
    name: as it stands in tables and pages.
    meaning: plain sentences.
    also: other words under which it is looked up.
    """

    name: str
    meaning: str
    also: tuple[str, ...] = ()


TERMS = (
    Term(
        "barrier",
        "How much worse the loss gets on the straight line from model A to model B than a straight line between their "
        "two losses would be. A barrier near zero means that an average of the two works as well as they do.",
        ("loss barrier",),
    ),
    Term(
        "nat",
        "The unit of a cross-entropy loss with natural logarithms. A loss that grows by 0.1 nats means that the right "
        "answer gets about 10 % less probability.",
        ("nats",),
    ),
    Term(
        "space",
        "A set of neurons that may change places with each other without changing what the network computes. mergeid "
        "finds the spaces by tracing the network and proves each of them.",
        ("spaces", "neuron space"),
    ),
    Term(
        "neuron graph",
        "All spaces of a network, with the axes of the weight tensors that each space moves.",
        ("graph",),
    ),
    Term(
        "permutation",
        "A new order of the neurons of a space. Applied to all weights that the space touches, it leaves the network's "
        "function unchanged.",
    ),
    Term("direct", "The neurons already correspond, so the weights are averaged as they are.", ("as is", "unaligned")),
    Term(
        "match",
        "The neurons of B are put into A's order before the weights are averaged.",
        ("matched", "aligned", "alignment", "matching"),
    ),
    Term(
        "will not merge",
        "No order of B's neurons makes them correspond to A's. An average of these two networks would be of no use.",
    ),
    Term(
        "moved",
        "How many neurons of a space get another place when B is put into A's order.",
    ),
    Term(
        "J",
        "The mean correlation of the activations of paired neurons: as they are, under the best match, and at random. "
        "1 means that the paired neurons always agree.",
        ("correlation", "j as is", "j match", "j random"),
    ),
    Term(
        "ι",
        "The identifiability index (iota): 1 where the neurons correspond as they are, 0 where they correspond no "
        "better than at random. ι = (J as is − J random) / (J match − J random).",
        ("iota", "identifiability index", "index"),
    ),
    Term(
        "chord deviation",
        "How far the output of the next layer is from the average of the two networks' outputs, relative to its size.",
        ("chord", "chord as is", "chord match"),
    ),
    Term(
        "gain",
        "How much better the match fits weights that it has not seen, in standard deviations (σ) of a random order.",
        ("gain (σ)",),
    ),
    Term(
        "residual stream",
        "The activations that skip connections carry from block to block. All blocks read and write the same neurons, "
        "so one decision holds for all of them.",
    ),
    Term(
        "solved",
        "After averaging, every layer gets the weights that best reproduce the models' own answers on the calibration "
        "inputs. The result is no longer on the straight line between the models.",
        ("solve",),
    ),
    Term(
        "repaired",
        "The statistics of the normalisation layers are estimated again after the merge, because averaging shrinks the "
        "activations.",
        ("repair", "re-estimated", "batchnorm"),
    ),
    Term(
        "calibration inputs",
        "Examples of the kind that the models were trained on. mergeid runs both models on them and does not look at "
        "labels.",
        ("calibration", "data"),
    ),
    Term(
        "λ",
        "The share of model B in the mix: 0 is A, 1 is B, and 0.5 is the average.",
        ("lambda",),
    ),
    Term(
        "structure",
        "What both models share by construction: a common base model, or the fixed parts of asymmetric layers. Where "
        "it holds every neuron in its place, no matching is needed.",
        ("identified by structure",),
    ),
    Term(
        "margin",
        "What it would cost, in squared weights, to train one order of the neurons into the functions of another.",
    ),
    Term(
        "angle",
        "The widest angle between the difference of two neurons' weights and the difference of their fixed parts. "
        "Below 45° in both models no swap brings the neurons of B nearer to those of A.",
    ),
    Term(
        "last look",
        "Before anything is written, the possible merges run on calibration inputs. The one that stays nearest to the "
        "models' own predictions is written.",
    ),
    Term(
        "interval",
        "A range that should hold the true value in 90 of 100 cases, calibrated on hundreds of measured pairs.",
        ("90 % interval",),
    ),
    Term(
        "rank correlation",
        "Whether two lists of numbers put the pairs in the same order (Spearman): 1 for the same order, 0 for "
        "unrelated ones, -1 for the reverse.",
        ("spearman",),
    ),
    Term(
        "AUROC",
        "The chance that a pair which merges badly gets a worse figure than a pair which merges well: 1 is perfect, "
        "0.5 a guess.",
        ("auc",),
    ),
    Term(
        "CKA",
        "An index of how alike two layers arrange the same inputs, whatever the order of their neurons. It is 1 for "
        "the same arrangement up to a rotation and a scale, and 0 for unrelated ones.",
        ("centred kernel alignment",),
    ),
    Term(
        "task vector",
        "What fine-tuning changed: the weights of a fine-tune minus those of its base.",
        ("τ", "task vectors"),
    ),
    Term(
        "sketch",
        "A small file that keeps what one model does on some inputs. Every pair among many sketches can be compared "
        "without running a model again.",
    ),
)


def explain(word: str) -> Term:
    """The term of that name, or of another word for it, whatever its case.

    Raises:
        MergeidError: an unknown word; the message names near ones."""
    wanted = word.strip().casefold()
    known = {name.casefold(): term for term in TERMS for name in (term.name, *term.also)}
    if wanted in known:
        return known[wanted]
    near = list(dict.fromkeys(known[n].name for n in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)))
    hint = f"did you mean {' or '.join(near)}?" if near else "mergeid explain without a word lists all terms"
    raise MergeidError(f"no explanation for {word!r}; {hint}")
