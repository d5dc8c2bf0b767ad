"""The inputs of one layer of a model, and of the sites within it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sparsetrace.model.decoder import Block, Decoder

# Arguments of `Block.forward`, the hidden states first.
BlockInputs = tuple[Any, ...]


def block_inputs(decoder: Decoder, passes: Iterable[tuple[Tensor, Tensor]], layer: int) -> Iterator[BlockInputs]:
    """Arguments of one layer's forward in each pass; the model is run up to that layer.

    Args:
        decoder: not altered but for the layers left out while this runs.
        passes: token ids and positions [B, T].
        layer: which.
    """
    layers = decoder.layers
    seen: list[BlockInputs] = []
    with _on_entry(layers[layer], lambda *arguments: seen.append(arguments)):
        decoder.layers = layers[: layer + 1]
        try:
            for tokens_BT, positions_BT in passes:
                decoder(tokens_BT, positions_BT)
                yield seen.pop()
        finally:
            decoder.layers = layers


@contextmanager
def observe_sites(block: Block, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(site, x [B, T, K]) with each vector that enters a site of the block."""

    def seeing(site: str) -> Callable[[Tensor], None]:
        return lambda x_BTK: see(site, x_BTK)

    with ExitStack() as hooks:
        for site in block.sites:
            hooks.enter_context(_on_entry(getattr(block, site.name), seeing(site.name)))
        yield


@contextmanager
def _on_entry(module: nn.Module, see: Callable[..., None]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(lambda _, arguments: see(*arguments))
    try:
        yield
    finally:
        hook.remove()
