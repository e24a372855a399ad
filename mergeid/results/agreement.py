"""Are inputs of the kind that the models know? Whether the models' agreement bears out how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

BORNE_OUT = 0.5
"""Share of what the models' confidence promises beyond chance that their agreement must keep."""
ROOM = 0.1
"""How much surer than chance models must be for their agreement to tell anything: where nearly all that they name is
one class, luck decides."""
ONE_NAME = 0.95
"""Agreement by chance from which on models that know three classes or more call nearly all inputs by one name."""
DOUBT = 2.0
"""Standard errors that the agreement must be below the confidence by, to be below it."""


@dataclass(frozen=True)
class Agreement:
    """What models say of the same inputs.

    Attributes:
        sure: mean probability that a model gives to the class that it names.
        alike: share of inputs that two models name the same class of.
        chance: what that would be if each named its classes as often, but of inputs drawn at random.
        error: standard error of sure − alike.
        examples: how many were looked at.
        classes: that the models know.
    """

    sure: float
    alike: float
    chance: float
    error: float
    examples: int
    classes: int = 0

    @property
    def told(self) -> bool:
        """Whether there is nothing against the inputs: the models are borne out, and name more than one class."""
        return self.borne_out and not self.one_name

    @property
    def one_name(self) -> bool:
        """Whether the models call nearly all inputs by one name, as some do with noise. They agree then, but only
        inputs of other classes would show whether they know what they see."""
        return self.classes > 2 and self.chance >= ONE_NAME

    @property
    def borne_out(self) -> bool:
        """Whether the models agree about as often as they are sure. False: the inputs seem to be of another kind than
        those that the models were trained on (`mergeid.evaluate.agreement`)."""
        if not (self.sure - self.alike > DOUBT * self.error and self.sure - self.chance > ROOM):
            return True
        return not self.alike - self.chance < BORNE_OUT * (self.sure - self.chance)

    @property
    def found_out(self) -> str:
        """What the user is told first where there is something against the inputs."""
        if self.one_name:
            return (
                f"the models name one and the same class on nearly all of the {self.examples} calibration inputs, so "
                f"that nothing shows whether they know such inputs"
            )
        return (
            f"the calibration inputs seem to be of another kind than the training data: on {self.examples} of them the "
            f"models are {self.sure:.0%} sure of their classes, but name the same one on {self.alike:.0%} only"
        )

    @property
    def held_against(self) -> str:
        """What the user is told then of a prediction."""
        return (
            f"{self.found_out}. What is said about a merge holds for such inputs only; give inputs like those that the "
            f"models were trained on, prepared in the same way"
        )

    def note(self, leans: bool) -> str:
        """What the user is told then of a merge. `leans`: whether the one that is written does."""
        did = (
            "All layers but the last therefore keep to one model: a merge solved towards all models fits only "
            "such inputs."
            if leans
            else "So no merge was solved."
        )
        apart = "" if self.one_name else ". For models of different tasks, give separate data for each (--data a=…,b=…)"
        kinds = ", and of several classes" if self.one_name else ""
        return (
            f"{self.found_out}. {did} Give inputs like those that the models were trained on, prepared in the same "
            f"way{kinds}{apart}; --repair solve solves anyway"
        )

    def to_json(self) -> dict[str, float]:
        """For records."""
        return {"sure": self.sure, "alike": self.alike, "chance": self.chance, "error": self.error}
