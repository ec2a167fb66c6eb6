"""One pipeline chunk of the hybrid language model.

megatron's `TransformerBlock` runs the layers, each built from its own spec; embedding, head and
MTP are placed on the first and last stage. The last stage returns losses per token, never a mean:
normalisation belongs to the training step, which knows the global counts.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.model.documents import Documents, make_documents
from ring_train.model.head import OutputLayer
from ring_train.model.mtp import MtpBlock
from ring_train.model.norm import RMSNorm
from ring_train.model.precision import without_fp8
from ring_train.model.specs import make_layer_spec
from ring_train.ops.rope import rotary_angles
from ring_train.plan import Phase, Plan
from ring_train.plan.kernels import keeps_all_logits


class PackedTokens(Protocol):
    """What the layers read of a row of t tokens."""

    tokens: torch.Tensor
    """[t] int64."""
    position_ids: torch.Tensor
    """[t] int64, 0 at the start of every document."""
    padding_mask: torch.Tensor
    """[t] bool, True where the token is padding."""
    num_padding: int
    """How many are."""


class PackedRow(PackedTokens, Protocol):
    """What the forward reads of a micro batch (`ring_train.data.batch.Batch` provides it)."""

    labels: torch.Tensor
    """[t] int64, the next token within the document."""
    cu_seqlens: torch.Tensor
    """[n_docs + 1] int32."""
    mtp_tokens: torch.Tensor
    """[depths, t] int64, the token k further on."""
    mtp_labels: torch.Tensor
    """[depths, t] int64, the token k + 1 further on."""


class LayerInputs(NamedTuple):
    """What every layer reads beside the hidden states."""

    angles: torch.Tensor
    """[2, t, rotary_dim] fp32: cos and sin of every token's angles."""
    documents: Documents
    """Boundaries of the row."""
    padding_mask: torch.Tensor | None
    """[1, t/sp] bool, True where padding; None where there is none."""


class HybridLanguageModel(MegatronModule):
    """The layers of one virtual pipeline stage, with embedding and head where they belong.

    Args:
        plan: the plan; `plan.pipeline.stages` says which layers this stage holds.
        config: megatron's config built from the plan.
        groups: process groups of the mesh.
        vp_stage: index of the model chunk on this rank, None without interleaving.
    """

    def __init__(
        self,
        plan: Plan,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        model = plan.config.model
        self.plan, self.groups, self.vp_stage = plan, groups, vp_stage
        self.model_type = ModelType.encoder_or_decoder  # read by megatron's schedules
        stage = (vp_stage or 0) * plan.mesh.pp + groups.pp.rank()
        self.pre_process = stage == 0
        self.post_process = stage == len(plan.pipeline.stages) - 1
        self.rotary_base = model.rotary_base
        self.rotary_scaling_factor = model.rotary_scaling_factor
        self.has_mtp = self.post_process and plan.layers.num_mtp > 0
        if self.pre_process or self.has_mtp:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=model.vocab_size,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
            weight: Any = self.embedding.word_embeddings.weight
            weight.shared_embedding = True
            weight.shared = not self.pre_process  # counted once in the gradient norm
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                layer_specs=[make_layer_spec(plan, config, i) for i in plan.pipeline.stages[stage]],
                layer_norm=partial(RMSNorm, backend=plan.config.kernels.fused.value),
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if self.has_mtp:
            depths = range(plan.layers.num_mtp)
            layers = [make_layer_spec(plan, config, model.num_layers + depth) for depth in depths]
            self.mtp = MtpBlock(config, layers, groups, plan.config.kernels.fused.value)
        if self.post_process:
            assert config.init_method is not None
            self.output_layer = OutputLayer(
                config.hidden_size,
                model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
                norm_head=model.norm_head,
            )

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether first and last stage hold copies of one embedding (read by megatron)."""
        return self.plan.mesh.pp > 1 and self.plan.layers.num_mtp > 0

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter:
        """Return the embedding whose gradient is summed over first and last stage."""
        return self.embedding.word_embeddings.weight

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the hidden states [t/sp, 1, h] of the previous stage (called by the schedules)."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(self, batch: PackedRow) -> torch.Tensor:
        """Return losses [1 + depths, t] fp32 on the last stage, hidden states elsewhere.

        Row 0 is the cross-entropy of the next token, row k that of MTP depth k. Masked positions
        hold a value of no meaning: multiply by the batch's masks.

        Args:
            batch: one micro batch as a packed row of t tokens, on this rank's device; under
                context parallelism this rank's tokens of it, with the boundaries of the whole.
        """
        cp_group = self.groups.cp
        documents = make_documents(batch.cu_seqlens, cp_group.size(), cp_group.rank())
        inputs = self.layer_inputs(batch, documents)
        hidden = self.hidden_states(batch.tokens, inputs)
        if not self.post_process:
            return hidden
        losses = [self.token_losses(hidden, batch.labels)]
        if self.has_mtp:
            for depth, layer in enumerate(self.mtp.layers):
                embedding = self.embed(batch.mtp_tokens[depth])
                hidden = layer(hidden, embedding, *inputs)
                losses.append(self.token_losses(hidden, batch.mtp_labels[depth]))
        return torch.stack(losses)

    def layer_inputs(self, row: PackedTokens, documents: Documents) -> LayerInputs:
        """Return what every layer reads beside the hidden states of a row."""
        model = self.plan.config.model
        angles = rotary_angles(
            row.position_ids,
            int(model.kv_channels * model.rotary_percent),
            self.rotary_base,
            dtype=torch.promote_types(self.config.params_dtype, torch.float32),
            yarn=self._yarn(),
        )
        return LayerInputs(torch.stack(angles), documents, self._padding_mask(row))

    def hidden_states(self, tokens: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Return what the layers of this stage make of a row: [t/sp, 1, h].

        After the final norm on the last stage. The first stage begins with the tokens [t], others
        with what `set_input_tensor` got.
        """
        is_decoding = inputs.documents.decoding is not None
        with without_fp8(self.decoder) if is_decoding else contextlib.nullcontext():
            return self.decoder(
                self.embed(tokens) if self.pre_process else None,
                attention_mask=None,
                rotary_pos_emb=inputs.angles,
                packed_seq_params=inputs.documents,
                padding_mask=inputs.padding_mask,
            )

    def next_token_logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [m, v] fp32 (fp64) after m tokens of a row, on every rank of tp.

        Collective over tp; on the last stage only, without gradients.

        Args:
            hidden: [t/sp, 1, h], of `hidden_states`.
            tokens: [m] int64, places in the row.
        """
        group = self.groups.tp
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        weight: Any = self.output_layer.weight  # None only where layers share one
        logits = torch.nn.functional.linear(self.output_layer.scaled(hidden[tokens, 0]), weight)
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=group)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def enter_phase(self, phase: Phase) -> None:
        """Use the position embedding of a phase from the next forward on."""
        self.rotary_base = phase.rotary_base
        self.rotary_scaling_factor = phase.rotary_scaling_factor

    def _yarn(self) -> tuple[float, int] | None:
        """Return (factor, original context) of the stretched position embedding, if it is."""
        original = self.plan.config.model.original_max_position_embeddings
        if self.rotary_scaling_factor == 1 or original is None:
            return None
        return self.rotary_scaling_factor, original

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [t/sp, 1, h] of token ids [t]."""
        return self.embedding(tokens[None], None)

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return -log p(label) [t] fp32 (fp64) of hidden states [t/sp, 1, h] and labels [t]."""
        kernels = self.plan.config.kernels
        if not keeps_all_logits(self.plan.config, len(labels)):
            return self.output_layer.chunked_losses(
                hidden,
                labels,
                num_tokens=kernels.cross_entropy_chunk_tokens,
                backend=kernels.fused.value,
            )
        logits, _ = self.output_layer(hidden)  # [t, 1, v/tp]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = tensor_parallel.vocab_parallel_cross_entropy(
            logits, labels[:, None], tp_group=self.groups.tp
        )
        return loss.squeeze(1)

    def _padding_mask(self, row: PackedTokens) -> torch.Tensor | None:
        """Return [1, t/sp] bool, True where padding, for this rank's part of the sequence."""
        if not row.num_padding:
            return None
        mask = row.padding_mask
        if self.config.sequence_parallel:
            mask = mask.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        return mask[None]
