"""Which modules a method touches: whole-name globs, and replacement that keeps shared modules shared."""

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from .config import MethodConfig
from .errors import ConfigError, NothingMatched


def glob_matches(name: str, glob: str) -> bool:
    """Whether the whole `name` matches: `*` any run of characters, dots too, `?` any one character.

    >>> glob_matches("model.layers.11.mlp", "model.layers.1.*"), glob_matches("model.layers.1.mlp", "model.layers.1.*")
    (False, True)
    """
    pattern = re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(pattern, name) is not None


def select_names(
    names: Iterable[str], include: Sequence[str] = ("*",), exclude: Sequence[str] = (), field: str = "include"
) -> list[str]:
    """Names that match a glob of `include`, which the user knows as `field`, and none of `exclude`, in their order.

    Raises:
        NothingMatched: a glob matches no name, or no name is left.

    >>> select_names(["a.q", "a.k", "b.q"], include=["*.q"], exclude=["b.*"])
    ['a.q']
    """
    names = list(names)
    for given, globs in ((field, include), ("exclude", exclude)):
        for glob in globs:
            if not any(glob_matches(name, glob) for name in names):
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                raise NothingMatched(
                    f"{given} glob {glob!r} matches none of {len(names)} modules ({shown}); embedding and head have fields of their own"
                )
    chosen = [
        name
        for name in names
        if any(glob_matches(name, glob) for glob in include) and not any(glob_matches(name, glob) for glob in exclude)
    ]
    if not chosen:
        raise NothingMatched(f"include {list(include)} without exclude {list(exclude)} leaves none of {len(names)} modules")
    return chosen


def select_stages(names: Iterable[str], stages: Sequence[MethodConfig]) -> list[set[str]]:
    """The targets of every stage, by the names of the dense model; a stage that includes nothing has none.

    A stage that selects what an earlier one has taken apart into Linears compresses those.

    Raises:
        NothingMatched: a stage selects nothing.
        ConfigError: a stage selects a module that an earlier one compresses for good, or that is another one by the time it
            has measured it.
    """
    names = list(names)
    chosen = [set(select_names(names, stage.include, stage.exclude)) if stage.include else set() for stage in stages]
    taken, opened = set[str](), set[str]()
    for position, (stage, here) in enumerate(zip(stages, chosen, strict=True)):
        twice = sorted(here & taken)
        changed = sorted(here & opened) if stage.deals_out_bits else []
        (opened if stage.leaves_linears else taken).update(here)
        if twice:
            raise ConfigError(
                f"recipe.stages[{position}] selects {twice[0]}, which an earlier stage compresses: exclude it in one"
            )
        if changed:
            raise ConfigError(
                f"recipe.stages[{position}] deals out its bits by what it measures on the dense model, in which {changed[0]} is not "
                "yet what an earlier stage makes of it: set its sensitivity to none, or exclude it in one"
            )
    return chosen


def replace_modules(model: nn.Module, names: Iterable[str], build: Callable[[str, nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """Replace the named modules by `build(name, old)`; a module known by several names is built once and stays shared.

    Returns:
        Every replaced name, aliases included, with its new module.
    """
    built = {}
    for name in names:
        old = model.get_submodule(name)
        if old not in built:
            built[old] = build(name, old)
    replaced = {name: built[old] for name, old in model.named_modules(remove_duplicate=False) if old in built}
    for name, new in replaced.items():
        model.set_submodule(name, new)
    return replaced
