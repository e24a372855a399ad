"""Formats that mergeid writes for others to read, as pydantic models: plans and records (``mergeid.json``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from mergeid.io.recipe_schema import RecipeFile
from mergeid.io.schema import (
    Count,
    GraphFile,
    Own,
    PointsFile,
    RecordConfigs,
    RecordResized,
    SketchAbout,
    ZipRecord,
)

Decision = Literal["direct", "match", "will not merge"]


class PlanSpace(Own):
    """What was decided about one space; the fields are explained in `mergeid.evidence.decide.SpaceEvidence`."""

    id: str
    label: str
    size: Count
    blocks: Count
    parents: list[str]
    share: float
    decision: Decision
    why: str
    evidence: Literal["activations", "weights", "structure", "none"]
    moved: Count = 0
    j_identity: float | None = None
    j_match: float | None = None
    j_random: float | None = None
    iota: float | None = None
    iota_low: float | None = None
    iota_high: float | None = None
    deviation_identity: float | None = None
    deviation_match: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    chord_identity: float | None = None
    chord_match: float | None = None
    structure: PlanStructure | None = None
    certificate: PlanCertificate | None = None


class PlanMargins(Own):
    """One model's margins; infinite ones are null."""

    margin: float | None
    identity_optimal: bool
    least_swap: float | None
    median_swap: float | None
    bad_swaps: float | None
    by_gap: float | None = None
    by_norm: float | None = None
    radius: float | None = None


class PlanLayer(Own):
    """One layer that makes a space, see `mergeid.evidence.layers.LayerRecord`."""

    layer: str
    space: str
    source: str
    neurons: Count
    inputs: Count
    k: Count
    coherence: float | None
    eigengap: float | None
    explained: float | None
    centred: bool
    gamma_out: float | None
    gamma_in: float | None
    a: PlanMargins
    b: PlanMargins


class PlanStructure(Own):
    space: str
    layers: list[PlanLayer]
    a: PlanMargins
    b: PlanMargins


class PlanCertificate(Own):
    """What fixed parts say of a space, see `mergeid.evidence.anchored.Certificate`."""

    space: str
    says: Literal["identified", "identified if the inputs correspond", "not identified"]
    why: str
    angle_a: float | None = None
    angle_b: float | None = None
    breaks: list[str] = Field(default_factory=list)
    gap: str = ""


class PlanTurn(Own):
    """Heads of one space that are turned."""

    space: str
    kind: str
    heads: Count
    turned: Count


class PlanMap(Own):
    """Signs, an orthogonal map or scales of one space of B, before its neurons were compared."""

    space: str
    kind: str
    units: Count
    changed: Count


class PlanSolved(Own):
    """A layer, and its error on unseen inputs as averaged and solved (shares of the targets' spread)."""

    tensors: list[str]
    ridge: float | None
    error_before: float
    error_after: float


class PlanGraph(Own):
    share: float
    verified: dict[str, Any] | None
    frozen: Count
    unknown_ops: dict[str, Any]


class PlanFile(Own):
    """``mergeid.plan/1``."""

    format: Literal["mergeid.plan/1"]
    a: str
    b: str
    arch: str
    match: str
    verdict: Decision
    evidence: str
    examples: Count
    seed: int
    settings: dict[str, Any]
    notes: list[str]
    structure: dict[str, Any]
    spaces: list[PlanSpace]
    permutations: dict[str, list[Count]]
    turns: list[PlanTurn] = Field(default_factory=list)
    maps: list[PlanMap] = Field(default_factory=list)
    solved: list[PlanSolved] = Field(default_factory=list)
    fingerprints: list[str] = Field(default_factory=list)
    graph: PlanGraph


class RecordInput(Own):
    """A checkpoint that went in; `sha256` by file."""

    source: str
    path: str
    sha256: dict[str, str]
    weight: float | None = None


class RecordOutput(Own):
    distance: float | None
    unit: Literal["nats", "relative"]


class RecordAgreement(Own):
    """What models say of inputs that seem to be of another kind, see `mergeid.results.agreement.Agreement`."""

    sure: float
    alike: float
    chance: float
    error: float


class RecordComparison(Own):
    """The last look, see `mergeid.results.comparison.Comparison`."""

    planned: str
    chosen: str
    repair: str
    distance: float | None
    unit: Literal["nats", "relative", "both"]
    distances: dict[str, float | None]
    outputs: dict[str, RecordOutput]
    examples: Count
    error: float | None
    unlike: RecordAgreement | None = None
    apart: float | None = None
    unasked: str | None = None


class RecordPlaces(Own):
    """A further model's rows beside the first one's, see `mergeid.combine.in_place`."""

    axes: Count
    rows: Count
    astray: Count
    others: Count
    largest_ratio: float


class RecordHeads(Own):
    """A head with the classes of several models: its tensors, and how many classes each model has, in their order."""

    tensors: list[str]
    classes: list[Count]


class MergeRecord(Own):
    """``mergeid.record/1`` of a merge."""

    format: Literal["mergeid.record/1"]
    output: str
    method: str
    inputs: Annotated[list[RecordInput], Field(min_length=1)]
    base: RecordInput | None = None
    settings: dict[str, Any] | None = None
    skipped: list[str]
    left_out: list[str]
    taken_from_a: list[str]
    overridden: list[str]
    dtypes: dict[str, str]
    versions: dict[str, str]
    verdict: str | None = None
    config: RecordConfigs | None = None
    resized: list[RecordResized] = Field(default_factory=list)
    heads: RecordHeads | None = None
    plan: PlanFile | None = None
    further_plans: list[PlanFile] = Field(default_factory=list)
    repaired: list[str] = Field(default_factory=list)
    repair: dict[str, Any] | None = None
    comparison: RecordComparison | None = None
    in_place: dict[str, RecordPlaces] | None = None


class TransportEntry(Own):
    transport: Literal[True]
    a: str
    b: str


class AlignRecord(Own):
    """``mergeid.record/1`` of a model in another one's order of neurons."""

    format: Literal["mergeid.record/1"]
    output: str
    align: PlanFile | TransportEntry
    config: RecordConfigs | None = None
    resized: list[RecordResized] = Field(default_factory=list)


class ScrambleEntry(Own):
    source: str
    seed: int
    arch: str
    max_relative_error: float
    maps: list[PlanMap] = Field(default_factory=list)


class ScrambleRecord(Own):
    """``mergeid.record/1`` of a model in a random order of neurons."""

    format: Literal["mergeid.record/1"]
    output: str
    scramble: ScrambleEntry


class FoldEntry(Own):
    source: str
    sha256: dict[str, str]


class FoldRecord(Own):
    """``mergeid.record/1`` of an asymmetric model written as a plain one."""

    format: Literal["mergeid.record/1"]
    output: str
    folded: FoldEntry


def _kind(record: Any) -> str:
    if isinstance(record, Own):
        return next(t for m, t in _TAGS.items() if isinstance(record, m))
    told = record if isinstance(record, dict) else {}
    return (
        "zip"
        if told.get("method") == "zip"
        else next((k for k in ("align", "scramble", "folded") if k in told), "merge")
    )


_TAGS: dict[type[Own], str] = {
    MergeRecord: "merge",
    AlignRecord: "align",
    ScrambleRecord: "scramble",
    FoldRecord: "folded",
    ZipRecord: "zip",
}
RecordFile = Annotated[
    Annotated[MergeRecord, Tag("merge")]
    | Annotated[AlignRecord, Tag("align")]
    | Annotated[ScrambleRecord, Tag("scramble")]
    | Annotated[FoldRecord, Tag("folded")]
    | Annotated[ZipRecord, Tag("zip")],
    Discriminator(_kind),
]
"""Any ``mergeid.json``."""


def published() -> dict[str, dict[str, Any]]:
    """JSON schemas of mergeid's own formats: "recipe", "graph", "plan", "sketch" (its metadata), "record" and
    "barrier-points"."""
    formats: dict[str, Any] = {
        "recipe": RecipeFile,
        "graph": GraphFile,
        "plan": PlanFile,
        "sketch": SketchAbout,
        "record": RecordFile,
        "barrier-points": PointsFile,
    }
    return {name: TypeAdapter(kind).json_schema() for name, kind in formats.items()}
