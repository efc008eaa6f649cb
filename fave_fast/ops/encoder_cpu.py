"""The encoder in C++ (`csrc/encoder.cpp`): the model's weights packed for it, and its calls.

In bfloat16 the products take bfloat16 and sum in float32 where the CPU has AVX-512 BF16. On AVX2 they take 16-bit
integers, to which rows and columns are scaled, and sum exactly; the error is smaller than bfloat16's. Elsewhere the
same weights are widened. Between products everything is float32, the residual stream too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast.ops import native
from fave_fast.ops.attention import rotary_by_age

if TYPE_CHECKING:
    from fave_fast._C import Encoder
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call


@dataclass(frozen=True)
class NativeWeights:
    """A model's weights in the order in which the CPU reads them.

    Attributes:
        encoder: holds them; `encoder.isa` is the instruction set they are packed for.
    """

    encoder: Encoder

    @classmethod
    def pack(cls, model: FAVE, isa: str | None = None) -> NativeWeights | None:
        """Copy the weights of `model`; None where it is not on the CPU, in another dtype, or there is no extension.

        Args:
            model: in float32 or bfloat16.
            isa: an instruction set of `_C.instruction_sets()`; by default the one of FAVE_FAST_ISA, or the fastest.

        Raises:
            BackendError: FAVE_FAST_ISA names one that cannot run here.
            ValueError: `isa` does.
        """
        weight = model.item_embedding.weight
        if native.why_not(weight.device, weight.dtype) is not None:
            return None
        from fave_fast._C import Encoder

        config, final_norm, embedding_norm = model.config, model.final_norm, model.embedding_norm
        packed = cls(
            Encoder(
                d=config.d,
                heads=config.heads,
                hidden=config.ffn_mult * config.d,
                blocks=config.blocks,
                max_length=config.max_length,
                layer_norm=config.norm == "layer",
                rotary=config.position == "rotary",
                causal=config.attention == "causal",
                eps=_eps(final_norm),
                input_eps=_eps(embedding_norm),
                half=weight.dtype == torch.bfloat16,
                isa=native.isa() if isa is None else isa,
            )
        )
        packed.refresh(model)
        return packed

    @torch.no_grad()
    def refresh(self, model: FAVE) -> None:
        """Take the weights again after the model has changed; not while another thread encodes."""
        config = model.config
        blocks: Any = model.blocks
        for index, block in enumerate(blocks):
            layers = (block.qkv, block.attention_out, block.ffn_in, block.ffn_out)
            norms = (block.attention_norm, block.ffn_norm)
            self.encoder.load_block(index, *(_floats(layer.weight) for layer in layers), *map(_gain_and_bias, norms))
        cos, sin = rotary_by_age(config.max_length, config.d // config.heads)
        self.encoder.load_ends(_gain_and_bias(model.final_norm), cos.numpy(), sin.numpy())


def _eps(norm: Any) -> float:
    return float(norm.eps)


def _floats(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().float().contiguous().numpy()


def _gain_and_bias(norm: Any) -> npt.NDArray[np.float32]:
    gain = norm.weight.detach().float()
    bias = norm.bias.detach().float() if hasattr(norm, "bias") else torch.zeros_like(gain)
    return torch.stack((gain, bias)).numpy()


def run(call: _Call) -> None:
    """The endpoints of a call on the CPU."""
    packed, path, bounds = call.weights.native, call.path, call.bounds
    assert packed is not None
    length = call.padded_length or 0
    users = np.full(call.out.shape[0], length) if bounds is None else bounds.long().contiguous().numpy()
    out, threads = native.array(call.out), native.threads()
    if path is None:
        packed.encoder.encode(native.array(call.rows.detach()), users, length, out, threads)
        return
    packed.encoder.encode_ids(
        call.rows.long().numpy(),
        users,
        length,
        native.array(call.weights.model.item_embedding.weight.detach().contiguous()),
        *path.arrays,
        path.anchor,
        out,
        threads,
    )
