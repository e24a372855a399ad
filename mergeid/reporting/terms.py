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
        "The loss along the straight line from the weights of A to those of B, at its highest above a straight line "
        "between their two losses. A barrier near zero means that averages of the two work as well as they do.",
        ("loss barrier", "above chord", "at λ"),
    ),
    Term(
        "nats lost",
        "How far the loss of a merge lies above the mean of the two models' losses, in nats. A + after an interval "
        "means that a merge which is sure of wrong answers may lose even more.",
        ("lost", "in a trial"),
    ),
    Term(
        "beyond A",
        "How far the loss of a merge is expected to lie above that of the first model alone, in nats; below it where "
        "there is a minus. Predictions of this model and of those near it take the place of labels that are not there.",
    ),
    Term(
        "points",
        "The accuracy that a merge loses, in percentage points, against the mean of the two models' accuracies.",
        ("accuracy lost", "points, 90 %"),
    ),
    Term(
        "probability of losing no more",
        "The probability that a merge loses at most as many nats as --tolerate says (0.01 by default).",
        ("≤ nats", "≤ 0.01 nats", "within"),
    ),
    Term(
        "loss",
        "The mean cross-entropy of the model's predictions on labelled examples, in nats. Lower is better.",
        ("loss a", "loss b", "loss alone"),
    ),
    Term("accuracy", "The share of examples whose most probable class is the right one.", ("accuracy alone",)),
    Term(
        "trial",
        "A merge that --try makes in memory and runs on the data. What it says there makes the prediction better.",
        ("trials", "--try"),
    ),
    Term(
        "hard",
        "Nats that a merge lost in a trial, where the class that both models together find most probable counts as the "
        "truth.",
        ("pseudo-labels",),
    ),
    Term("soft", "Nats that a merge lost in a trial, where the mean prediction of both models counts as the truth."),
    Term("by labels", "Nats that a merge lost in a trial, measured with the labels of the data."),
    Term(
        "missed",
        "The share of classes that a merge predicts less often than the models do, counted over the inputs of a trial.",
    ),
    Term(
        "layers responsible",
        "The layers whose outputs in the merge lie farthest from the average of the two models' outputs.",
    ),
    Term(
        "nat",
        "The unit of a cross-entropy loss with natural logarithms. A loss that grows by 0.1 nats means that the right "
        "answer gets about 10 % less probability.",
        ("nats",),
    ),
    Term(
        "space",
        "A set of neurons that can be permuted among themselves without changing what the network computes. mergeid "
        "finds the spaces by tracing the network, and verifies each of them.",
        ("spaces", "neuron space", "id"),
    ),
    Term(
        "neuron graph",
        "All spaces of a network, with the axes of the weight tensors that each space permutes.",
        ("graph", "acts on (tensor[axis])", "space and its tensor[axis]"),
    ),
    Term("size", "The number of neurons of a space, or of a layer.", ("neurons",)),
    Term(
        "group",
        "How the neurons of a space may be permuted. S(64): all 64, in any order. 4 × S(16): inside each of 4 blocks. "
        "in s3: the blocks follow the neurons of space s3.",
    ),
    Term("share", "The share of the model's parameters that lie in tensors which the space permutes."),
    Term(
        "decision",
        "What is done with a space: direct (average as is), match (put B's neurons into A's order first), or will not "
        "merge.",
    ),
    Term(
        "permutation",
        "A new order of the neurons of a space. Applied to all weights that the space touches, it leaves the network's "
        "function unchanged.",
    ),
    Term(
        "direct",
        "The neurons already correspond, so the weights are averaged as is, without matching.",
        ("as is", "unaligned", "plain", "averaged"),
    ),
    Term(
        "match",
        "The neurons of B are put into A's order before the weights are averaged.",
        ("matched", "aligned", "alignment", "matching"),
    ),
    Term(
        "will not merge",
        "No order of B's neurons makes them correspond to A's, so an average of these two networks would not work.",
    ),
    Term(
        "mixed",
        "The merge as planned: B's neurons are put into A's order in the spaces where the plan says so, and stay as "
        "they are in the others. Beside it, plain matches none of them and matched all.",
        ("planned",),
    ),
    Term(
        "moved",
        "How many neurons of a space change position when B is put into A's order.",
    ),
    Term(
        "J",
        "The mean correlation between the activations of paired neurons: as is, under the best match, and for random "
        "pairs. 1 means that paired neurons always agree.",
        ("correlation", "j as is", "j match", "j random"),
    ),
    Term(
        "ι",
        "The identifiability index (iota): 1 where the neurons correspond as is, 0 where they correspond no "
        "better than at random. ι = (J as is − J random) / (J match − J random).",
        ("iota", "identifiability index", "index"),
    ),
    Term(
        "chord deviation",
        "How far the output of the merged next layer is from the average of the two networks' outputs, relative to the "
        "size of that average.",
        ("chord", "chord as is", "chord match"),
    ),
    Term(
        "gain",
        "How much of the moved neurons' similarity in weights comes from the match, and is not there in the current "
        "order. Above 100 % where the current order pairs opposites.",
    ),
    Term(
        "residual stream",
        "The activations that skip connections carry from block to block. All blocks read and write the same neurons, "
        "so one decision holds for all of them.",
    ),
    Term(
        "solved",
        "After averaging, every layer is refitted in closed form, so that its outputs on the calibration inputs are as "
        "near as possible to the models' mean. The result is no longer on the straight line between the models. Where "
        "neurons hardly correspond, hidden layers lean to one model (solve+lean).",
        ("solved, leaning", "solve", "solve+lean", "solve+polish"),
    ),
    Term(
        "regmean",
        "After averaging, every linear layer is refitted in closed form, so that it answers each model's own inputs as "
        "nearly as possible like that model.",
        ("matched, regmean", "direct, regmean"),
    ),
    Term(
        "repaired",
        "The statistics of the normalisation layers are re-estimated after the merge, because averaging shrinks the "
        "activations.",
        ("repair", "re-estimated", "batchnorm", "bn"),
    ),
    Term(
        "calibration inputs",
        "Examples of the kind that the models were trained on. mergeid runs both models on them and does not look at "
        "labels.",
        ("calibration", "data"),
    ),
    Term(
        "λ",
        "The share of model B in an average: 0 is A, 1 is B, and 0.5 is the midpoint.",
        ("lambda",),
    ),
    Term(
        "structure",
        "What both models share by construction: a common base model, or the fixed parts of asymmetric layers. If it "
        "keeps every neuron in its place, no matching is needed.",
        ("identified by structure",),
    ),
    Term(
        "ε*",
        "How far the covariance Σ of a layer's inputs may shift (spectral norm) before another order of its neurons "
        "could fit the fixed part as well. ε*/g divides it by Σ's eigengap, ε*/‖Σ‖ by Σ's norm.",
        ("ε", "ε*/g", "ε*/‖Σ‖", "certificate", "certified"),
    ),
    Term(
        "margin",
        "How much more it would cost, in squared weights, to train the functions of another order of the neurons from "
        "what both models share.",
    ),
    Term(
        "angle",
        "The widest angle between the difference of two neurons' weights and the difference of their fixed parts. "
        "Below 45° in both models, no swap brings the neurons of B nearer to those of A.",
    ),
    Term(
        "last look",
        "Before anything is written, the candidate merges run on calibration inputs. The one nearest to the models' "
        "own "
        "predictions is written.",
    ),
    Term(
        "interval",
        "A range that should hold the true value in 90 of 100 cases, calibrated on hundreds of measured pairs.",
        ("90 % interval", "95 % interval"),
    ),
    Term(
        "rank correlation",
        "Whether two lists of numbers put the pairs in the same order (Spearman): 1 for the same order, 0 for "
        "unrelated ones, -1 for the reverse.",
        ("spearman",),
    ),
    Term(
        "AUROC",
        "The probability that a pair which merges badly gets a worse score than a pair which merges well: 1 is "
        "perfect, "
        "0.5 is chance.",
        ("auc",),
    ),
    Term(
        "CKA",
        "How similar the activations of two layers are on the same inputs. The order of neurons makes no difference. "
        "It is 1 if they agree up to a rotation and a scale, and 0 if they are unrelated.",
        ("centred kernel alignment",),
    ),
    Term(
        "unbiased CKA",
        "CKA without the bias that few examples cause. Only this index can be compared between layers.",
        ("unbiased",),
    ),
    Term(
        "SVCCA",
        "The mean correlation of the directions that hold 99 % of the variance of two layers' activations.",
    ),
    Term(
        "PWCCA",
        "As SVCCA, but every direction counts by how much of the activations it explains.",
    ),
    Term("rows", "How many activations were compared: examples, times positions in an image or text."),
    Term("weight", "The share of a model in an average, or in a soup; 0 where it was left out."),
    Term("cosine", "The cosine of the angle between two task vectors: 1 for the same direction, 0 for unrelated ones."),
    Term(
        "cancelled",
        "Of the entries that both fine-tunes changed, the share that points apart and cancels in an average.",
        ("interference",),
    ),
    Term(
        "share of the change",
        "How much of all that the fine-tunes changed (in squared weights) lies in this tensor.",
    ),
    Term(
        "task vector",
        "What fine-tuning changed: the weights of a fine-tune minus those of its base.",
        ("τ", "task vectors", "task vectors of"),
    ),
    Term(
        "sketch",
        "A small file that records what one model does on some inputs. Any two sketches can be compared without "
        "running "
        "a model again.",
    ),
)


def explain(word: str) -> Term:
    """The term of that name, or of another word for it, whatever its case.

    Raises:
        MergeidError: an unknown word; the message names near ones."""
    wanted = word.strip().casefold()
    known = {name.casefold(): term for term in TERMS for name in (term.name, *term.also)}
    for part in (wanted, wanted.partition("+")[2]):  # a merge and its repair: what is not named so as a whole
        if part in known:
            return known[part]
    near = list(dict.fromkeys(known[n].name for n in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)))
    hint = f"did you mean {' or '.join(near)}?" if near else "mergeid explain without a word lists all terms"
    raise MergeidError(f"no explanation for {word!r}; {hint}")
