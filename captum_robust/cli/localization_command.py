"""The command ``captum-robust train localization``: printing only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._plurals import amount
from captum_robust.cli.options import command_of
from captum_robust.cli.printing import say, say_none_held_out, say_resumed, say_unusable
from captum_robust.training.settings import LocalizationSettings

if TYPE_CHECKING:
    from captum_robust.training import LocalizationRecipe, TrainingResult


@command_of(LocalizationSettings, resumes=True)
def localization(settings: LocalizationSettings) -> None:
    """Train a network that removes objects against a classifier that learns to miss nothing.

    First the classifier alone, on clean images, then both. Started again with the same arguments,
    a stopped or killed run goes on in the phase where it was, and ends with the weights that it
    would have had. Boxes are used to measure only; images without any are trained on all the same.
    Under accelerate launch or torchrun (-m captum_robust train localization) the processes share
    each batch.
    """
    from captum_robust.training.localization_recipe import LocalizationRecipe

    recipe = LocalizationRecipe(settings, progress=True)
    say_images(recipe)
    pretraining = recipe.pretrain()
    if pretraining is not None:
        say_resumed(pretraining)
        if rows := pretraining.evaluations:
            say(f"classifier alone: accuracy {rows[-1]['clean_accuracy']:.1%}")
    say_result(recipe.train(), recipe.file)


def say_images(recipe: LocalizationRecipe) -> None:
    """What is trained on and measured with."""
    training, testing = len(recipe.training), len(recipe.testing)
    say(
        f"{amount(training, 'image')} to train on, {testing} to measure with, "
        f"{amount(len(recipe.class_names), 'class')}"
    )
    if testing and not recipe.evaluation.can_score:
        say("no boxes are known of these images: the masks are trained, but not scored")
    settings = recipe.settings
    say_none_held_out(recipe.testing, settings.held_out if settings.evaluation_images else 0)
    say_unusable(recipe.images)
    if trunk := recipe.settings.trunk:
        how = "trained with the rest" if recipe.trains_trunk else "frozen"
        say(f"trunk: {trunk}, {how}")


def say_result(result: TrainingResult, file: Path) -> None:
    """How the networks did before and after, and where they are."""
    say_resumed(result)
    rows = result.evaluations
    if rows:
        say("\non images that were not trained on")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            say(f"  {when:<7} {_in_words(row)}")
    restarts = max((int(row.get("restarts", 0)) for row in result.rows), default=0)
    if restarts:
        times = "once" if restarts == 1 else f"{restarts} times"
        say(f"the masks collapsed {times}, and were started anew")
    say(f"\nnetwork: {file}")


def _in_words(row: Mapping[str, Any]) -> str:
    text = (
        f"mask {row['mask']:.3f}, its total variation {row['total_variation']:.3f}, accuracy "
        f"{row['clean_accuracy']:.1%}, without what is removed {row['masked_accuracy']:.1%}"
    )
    if "box_accuracy" not in row:
        return text
    box, both = row["box_accuracy"], row["box_and_class_accuracy"]
    return f"{text}; box right {box:.1%}, class too {both:.1%}"
