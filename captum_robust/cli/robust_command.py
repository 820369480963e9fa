"""The command ``captum-robust train robust``: printing only."""

from __future__ import annotations

from captum_robust._plurals import amount
from captum_robust.cli.options import command_of
from captum_robust.cli.printing import say, say_none_held_out, say_resumed, say_unusable
from captum_robust.training.settings import RobustSettings


@command_of(RobustSettings, resumes=True)
def robust(settings: RobustSettings) -> None:
    """Train a classifier that withstands attacks, on a folder of images.

    Started again with the same arguments, a stopped or killed run goes on, and ends with
    the weights that it would have had. The other commands take the result as --model NAME
    --weights OUT/model.safetensors. Under accelerate launch or torchrun
    (-m captum_robust train robust) the processes share each batch.
    """
    from captum_robust.training.robust_recipe import RobustRecipe

    recipe = RobustRecipe(settings, progress=True)
    say(
        f"{amount(len(recipe.training), 'image')} to train on, {len(recipe.testing)} held out, "
        f"{amount(len(recipe.class_names), 'class')}"
    )
    say_none_held_out(recipe.testing, settings.held_out)
    say_unusable(recipe.images)
    result = recipe.train()
    say_resumed(result)
    if rows := result.evaluations:
        say(f"\naccuracy on held-out images, clean and under PGD at {settings.epsilon:g}/255")
        for row, when in ((rows[0], "before"), (rows[-1], "after")):
            say(f"  {when:<8}{row['clean_accuracy']:6.1%}{row['robust_accuracy']:8.1%}")
    say(f"\nmodel: --model {recipe.network.name} --weights {recipe.file}")
