"""The command ``captum-robust train denoiser``: printing only."""

from __future__ import annotations

from captum_robust._plurals import amount
from captum_robust.cli.options import command_of
from captum_robust.cli.printing import say, say_none_held_out, say_resumed, say_unusable
from captum_robust.training.settings import DenoisingSettings


@command_of(DenoisingSettings, resumes=True)
def denoiser(settings: DenoisingSettings) -> None:
    """Train a network that takes noise out of images, in front of a classifier.

    Certified explanations of noisy copies become sharper with it (Certified(…, denoiser=…)).
    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. Under accelerate launch or torchrun
    (-m captum_robust train denoiser) the processes share each batch.
    """
    from captum_robust.training.denoising_recipe import DenoisingRecipe

    recipe = DenoisingRecipe(settings, progress=True)
    say(f"{amount(len(recipe.training), 'image')} to train on, {len(recipe.testing)} to look at")
    say_none_held_out(recipe.testing, settings.held_out, per_class=False)
    say_unusable(recipe.images)
    result = recipe.train()
    say_resumed(result)
    if rows := result.evaluations:
        say(f"\nof {amount(len(recipe.testing), 'image')} with noise of .25, the class stays of")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            say(f"  {when:<8}{row['kept']:6.1%} (without: {row['kept_without']:.1%})")
    say(f"\nnetwork: {recipe.file}")
