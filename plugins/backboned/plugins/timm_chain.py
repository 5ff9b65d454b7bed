"""The stages of a timm network, found by following the tensor through its modules."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from backboned.registry import Head, Stage

Call = tuple[str, object, object]
"""A module's path, its input and its output."""


class NotAChain(Exception):
    """A network that isn't one module after another; says where."""


def chain(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[tuple[Stage, ...], Head]:
    """The stages and the head of `model`, which is on the meta device. Raises `NotAChain`."""
    classifier = _classifier_path(model)
    hidden = sorted({name for name, _ in model.named_buffers()} - set(model.state_dict()))
    if hidden:
        raise NotAChain(f"it keeps buffers outside its state_dict, such as {hidden[0]}")
    if _is_vision_transformer(model):
        stages, head = _vision_transformer(model, classifier)
    else:
        blocks, opened = _feature_blocks(model)
        steps = _steps(model, opened | _ancestors(classifier), torch.empty(1, *input_shape, device="meta"))
        stages, head = _group(model, steps, classifier, blocks, opened - {""})
    owners = (*stages, head)
    stray = [key for key in model.state_dict() if sum(stage.has(key) for stage in owners) != 1]
    if stray:
        raise NotAChain(f"{stray[0]} is used outside of the chain")
    return stages, head


def _classifier_path(model: nn.Module) -> str:
    classifier = model.get_classifier()  # type: ignore[operator]  # every classifier of timm has it
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        raise NotAChain(f"its classifier is a {type(classifier).__name__}, not one Linear or Conv2d")
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    return paths[classifier]


def _ancestors(path: str) -> set[str]:
    """`""`, `"a"` and `"a.b"` for `"a.b.c"`."""
    parts = path.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def _feature_blocks(model: nn.Module) -> tuple[set[str], set[str]]:
    """What timm lists as feature blocks, and the plain containers to open in order to see them."""
    listed: set[str] = {item["module"] for item in model.feature_info}  # type: ignore[union-attr]
    modules = dict(model.named_modules())
    opened = {p for block in listed for p in _ancestors(block) if isinstance(modules.get(p), nn.Sequential)}
    return listed, opened | {""}


def _steps(model: nn.Module, opened: set[str], x: Tensor) -> list[str]:
    """The paths of the modules that `model` runs one after another, the `opened` ones replaced by their children."""
    calls: dict[str, list[Call]] = {path: [] for path in opened}
    ends: dict[str, Call] = {}

    def record(path: str, args: tuple[object, ...], output: object) -> None:
        call = (path, args[0] if args else None, output)
        if path in opened:
            ends[path] = call
        if path:
            calls[path.rpartition(".")[0]].append(call)

    handles = []
    for path, module in model.named_modules():
        if path in opened or path.rpartition(".")[0] in opened:
            handles.append(module.register_forward_hook(lambda _, args, y, path=path: record(path, args, y)))
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(_follow("", calls, ends))


def _follow(path: str, calls: dict[str, list[Call]], ends: dict[str, Call]) -> Iterator[str]:
    _, current, last = ends[path]
    before = "its input"
    for child, given, output in calls[path]:
        if given is not current:
            raise NotAChain(f"something other than a module happens between {before} and {child}")
        if child in calls:
            yield from _follow(child, calls, ends)
        else:
            yield child
        before, current = child, output
    if current is not last:
        raise NotAChain(f"something other than a module happens after {before}")


def _group(
    model: nn.Module, steps: list[str], classifier: str, blocks: set[str], containers: set[str]
) -> tuple[tuple[Stage, ...], Head]:
    """Stages around the feature blocks: what comes before is the stem, what comes after the pool."""

    def is_block(path: str) -> bool:
        module = model.get_submodule(path)
        if path.rpartition(".")[0] in containers:
            return _has_parameters(module)
        return path in blocks and any(_has_parameters(child) for child in module.children())  # not a lone norm

    at = steps.index(classifier)
    dropouts = at
    while dropouts and isinstance(model.get_submodule(steps[dropouts - 1]), nn.Dropout):
        dropouts -= 1
    groups: list[tuple[str, list[str]]] = [("stem", [])]
    last = max((i for i, step in enumerate(steps[:dropouts]) if is_block(step)), default=-1)
    for i, step in enumerate(steps[:dropouts]):
        if is_block(step):
            groups.append((step, []))
        elif i == last + 1:
            groups.append(("pool", []))
        groups[-1][1].append(step)
    stages = tuple(Stage.of(name, *paths) for name, paths in groups if paths)
    return stages, Head.at(classifier, *steps[dropouts:])


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_vision_transformer(model: nn.Module) -> bool:
    return type(model).__module__ == "timm.models.vision_transformer" and type(model).__name__ == "VisionTransformer"


def _vision_transformer(model: nn.Module, classifier: str) -> tuple[tuple[Stage, ...], Head]:
    """The chain of a `VisionTransformer`, which adds tokens and positions between its modules."""
    blocks = [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
    embed = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
    pool = Stage("pool", ("norm", "attn_pool", "fc_norm"), _pool)
    stages = (Stage("embed", embed, _embed), *(Stage.of(block, block) for block in blocks), pool)
    return stages, Head.at(classifier, "head_drop", classifier)


def _embed(model: nn.Module, x: Tensor) -> Tensor:
    """As the beginning of `VisionTransformer.forward_features`: `[batch, 3, h, w]` → `[batch, tokens, width]`."""
    tokens = model._pos_embed(model.get_submodule("patch_embed")(x))  # type: ignore[operator]
    embedded: Tensor = model.get_submodule("norm_pre")(model.get_submodule("patch_drop")(tokens))
    return embedded


def _pool(model: nn.Module, x: Tensor) -> Tensor:
    """As the rest of `forward_features` and `forward_head`: `[batch, tokens, width]` → `[batch, width]`."""
    pooled: Tensor = model.get_submodule("fc_norm")(model.pool(model.get_submodule("norm")(x)))  # type: ignore[operator]
    return pooled
