"""The command ``captum-robust train masking``: printing only."""

from __future__ import annotations

from captum_robust._plurals import amount
from captum_robust.cli.options import command_of
from captum_robust.cli.printing import say, say_none_held_out, say_resumed, say_unusable
from captum_robust.training.settings import MASKING_RECIPES, MaskingSettings


@command_of(MaskingSettings, resumes=True, recipes=MASKING_RECIPES)
def masking(settings: MaskingSettings) -> None:
    """Train a network that shows in one pass where the evidence of a class is.

    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. The network that it writes keeps the weights that had the
    lowest saliency metric on images not trained on; captum-robust video takes it as --network.
    --recipe imagenet is for ResNet-50 and ImageNet's Kaggle archive, on a GPU.
    Under accelerate launch or torchrun (-m captum_robust train masking) the processes share each
    batch.
    """
    from captum_robust.training.masking_recipe import MaskingRecipe, best_look

    recipe = MaskingRecipe(settings, progress=True)
    labelled = sum(label >= 0 for label in recipe.images.labels)
    say(
        f"{amount(len(recipe.training), 'image')} to train on, {len(recipe.testing)} to look at, "
        f"{labelled} of {len(recipe.images)} with a class"
    )
    if settings.validation is None:
        say_none_held_out(recipe.testing, settings.held_out, per_class=False)
    say_unusable(recipe.images)
    result = recipe.train()
    say_resumed(result)
    if result.evaluations:
        best = best_look(result)
        looked_at = min(len(recipe.testing), settings.evaluation_images)
        say(f"\nof {amount(looked_at, 'image')} not trained on")
        for row, when in ((result.evaluations[0], "before"), (best, f"step {best['step']}")):
            say(
                f"  {when:<10} saliency metric {row['saliency_metric']:.3f} (crop of "
                f"{row['area']:.2f} of the image, probability {row['probability']:.2f}), mask "
                f"{row['mask']:.3f}, of another class {row['mask_of_another']:.3f}"
            )
    say(f"\nnetwork: {recipe.file}")
