"""Building the Megatron-Core model of a Hugging Face config, with the statistics head in place of logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from urlvr_kernels import TokenStats as KernelStats
from urlvr_kernels import lm_head_stats

from ..config.parallel import ParallelSection
from ..distributed.layout import Layout
from .attention import PackedAttention, PackedRotaryEmbedding, PackedSequence
from .hf.families import Family, experts_of, rope_frequencies, rope_theta, shape_of
from .packing import PackedBatch

EXPERTS = "mlp.experts.local_experts."
"""What precedes a rank's number of an expert in the names of its parameters."""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: installed, and a CUDA device is there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def own_attention(share_prefix: bool, dtype: torch.dtype) -> bool:
    """Whether layers attend by this package's attention: Transformer Engine's knows no shared prefixes, and no packed
    sequences in float32."""
    return share_prefix or dtype == torch.float32 or not has_transformer_engine()


@dataclass(frozen=True)
class Head:
    """What the statistics head is asked for in one pass."""

    outputs: tuple[str, ...]
    temperature: float


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for the local layer spec. Megatron's own wrapper refuses sequence parallelism (torch_norm.py, 0.16.1);
    marking the weight is all it takes for `finalize_model_grads` to sum its gradient over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PolicyModel(GPTModel):
    """GPTModel whose head returns token statistics of the response tokens: `[T, V]` logits never leave it."""

    def __init__(self, *args: Any, real_vocab: int, frequencies: torch.Tensor, **kwargs: Any) -> None:
        """`frequencies`: `[head_dim / 2]` rotary angles a position."""
        super().__init__(*args, **kwargs)
        self.real_vocab = real_vocab
        self.head = Head(("logp",), 1.0)
        cp_group = self.rotary_pos_emb.cp_group  # type: ignore[has-type]
        self.rotary_pos_emb: torch.nn.Module = PackedRotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=cp_group,
            frequencies=frequencies,
        )

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | KernelStats:
        """Hidden states on inner pipeline stages; on the last one the statistics of the packed batch's targets."""
        if not self.post_process:
            return hidden_states
        packed: PackedSequence = kwargs["packed_seq_params"]
        assert packed.batch is not None
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        tp = self.pg_collection.tp
        stats = lm_head_stats(
            hidden_states.squeeze(1),
            weight,
            packed.batch.targets,
            temperature=self.head.temperature,
            vocab_start=tp.rank() * weight.shape[0],
            vocab_size=self.real_vocab,
            tp_group=tp if tp.size() > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
            outputs=self.head.outputs,
            row_index=packed.batch.out_rows,
            upstream=packed.batch.upstream,
            # Under Megatron's DDP the head adds its weight's gradient to the float32 buffer itself.
            wgrad="main_grad" if torch.is_grad_enabled() and hasattr(weight, "main_grad") else "autograd",
        )
        return stats if packed.batch.own is None else self._of_all_ranks(stats, packed.batch)

    def _of_all_ranks(self, stats: KernelStats, batch: PackedBatch) -> KernelStats:
        """The statistics of all response tokens of a micro-batch on every context-parallel rank, so that a loss may
        look at whole responses. `stats.loss`, the scalar of the one-pass head, remains that of this rank's tokens."""
        names = self.head.outputs
        own = torch.stack([getattr(stats, name) for name in names])
        whole = FromContextRanks.apply(own, batch.own, sum(batch.lengths), self.pg_collection.cp)
        return replace(stats, **dict(zip(names, whole.unbind(), strict=True)))


class FromContextRanks(torch.autograd.Function):
    """Statistics of the tokens of all context-parallel ranks, each of which is one rank's.

    Every rank makes the whole loss of them and lets it flow back to its own tokens alone: together, the ranks'
    gradients are the loss's.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, index: torch.Tensor, count: int, group: Any) -> torch.Tensor:
        """`own` `[K, r]`, at `index` `[r]` among `count` tokens -> `[K, count]`, the same bits on every rank."""
        ctx.save_for_backward(index)
        whole = own.new_zeros(len(own), count)
        whole[:, index] = own
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient at this rank's tokens."""
        (index,) = ctx.saved_tensors
        return gradients[0][:, index], None, None, None


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Megatron's settings for `model.recompute`."""
FP8: dict[str, dict[str, Any]] = {
    "none": {},
    **{name: {"fp8": name, "fp8_recipe": "tensorwise"} for name in ("hybrid", "e4m3")},
}
"""Megatron's settings for `model.fp8`."""
FP8_ROWS = 16
"""Of which 8-bit products want the number of rows to be a multiple."""


def transformer_config(
    hf: Mapping[str, Any],
    family: Family,
    parallel: ParallelSection,
    *,
    dtype: torch.dtype,
    recompute: str,
    fp8: str = "none",
) -> TransformerConfig:
    """Megatron's config of a Hugging Face one."""
    shape = shape_of(hf, tp=parallel.tp)
    std = float(hf.get("initializer_range", 0.02))
    more = {
        **RECOMPUTE[recompute],
        **FP8[fp8],
        **_stages(parallel),
        **(_experts(hf, parallel) if family.experts else {}),
    }
    return TransformerConfig(
        num_layers=int(hf["num_hidden_layers"]),
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=float(hf.get("rms_norm_eps", 1e-6)),
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=lambda weight: torch.nn.init.normal_(weight, 0.0, std),
        output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, 0.0, std),
        use_cpu_initialization=not torch.cuda.is_available(),
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        variable_seq_lengths=False,
        **more,
    )


def _stages(parallel: ParallelSection) -> dict[str, Any]:
    """How layers are cut into pipeline stages, where Megatron's even cut is not wanted."""
    fields: dict[str, Any] = {}
    if parallel.vpp > 1:
        # Batched messages of two ranks, each the other's next and previous one, are matched by their order alone, and
        # activations of the interleaved schedule would be taken for gradients of the same shape (seen on gloo).
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        fields["virtual_pipeline_model_parallel_size"] = parallel.vpp
    if parallel.stage_layers is not None:
        layout = [["decoder"] * count for count in parallel.stage_layers]
        fields["pipeline_model_parallel_layout"] = [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]
    return fields


def _experts(hf: Mapping[str, Any], parallel: ParallelSection) -> dict[str, Any]:
    """Routing as in transformers' Qwen3MoeTopKRouter: a softmax over all experts, of which the `topk` largest weigh the
    experts' outputs, made to add up to one where `norm_topk_prob` says so (a softmax over the chosen ones does).

    Of Megatron's dispatchers, "alltoall" takes as many tokens of each expert-parallel rank as it has; "allgather" wants
    the same number of all, and replicas have micro-batches of their own lengths.
    """
    return {
        "num_moe_experts": experts_of(hf),
        "expert_model_parallel_size": parallel.ep,
        "moe_ffn_hidden_size": int(hf["moe_intermediate_size"]),
        "moe_router_topk": int(hf["num_experts_per_tok"]),
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_layer_freq": 1,
    }


def layer_spec(
    config: TransformerConfig, *, share_prefix: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where there are GPUs and it is installed, Megatron's local ones elsewhere.

    Attention is Transformer Engine's for plain packed sequences, and this package's where prefixes are shared and in
    float32.
    """
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
        norm: Any = TENorm
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm = RMSNorm
        if config.num_moe_experts:
            # Routers ask whether Transformer Engine's matmul is there by a name that exists only where it is (0.16.1).
            moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
            # Checkpoints carry Transformer Engine's names, where the norm before experts stands alone.
            names = spec.submodules.sharded_state_dict_keys_map
            spec.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if "pre_mlp" not in k}
        if config.qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if own_attention(share_prefix, config.params_dtype):
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm)


def build_chunks(
    hf: Mapping[str, Any],
    family: Family,
    parallel: ParallelSection,
    layout: Layout,
    *,
    dtype: torch.dtype,
    recompute: str,
    share_prefix: bool,
    real_vocab: int,
    fp8: str = "none",
) -> list[PolicyModel]:
    """This rank's parts of the model (one, or `parallel.vpp` of them), on its device, with random weights."""
    config = transformer_config(hf, family, parallel, dtype=dtype, recompute=recompute, fp8=fp8)
    shape = shape_of(hf, tp=parallel.tp)
    chunks = []
    for stage in range(parallel.vpp):
        vp_stage = stage if parallel.vpp > 1 else None
        model = PolicyModel(
            config,
            layer_spec(config, share_prefix=share_prefix, vp_stage=vp_stage),
            vocab_size=shape.padded_vocab,
            max_sequence_length=int(hf["max_position_embeddings"]),
            pre_process=layout.pp_rank == 0 and stage == 0,
            post_process=layout.pp_rank == layout.pp - 1 and stage == parallel.vpp - 1,
            position_embedding_type="rope",
            rotary_base=int(rope_theta(hf)),
            share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
            parallel_output=True,
            vp_stage=vp_stage,
            real_vocab=real_vocab,
            frequencies=rope_frequencies(hf, shape.head_dim),
        )
        _set_experts_apart(model)
        chunks.append(model.to(layout.device))
    return chunks


def _set_experts_apart(model: PolicyModel) -> None:
    """Have Megatron give experts gradient buffers and an optimizer of their own at any layout. It does so with expert
    parallelism alone, and a checkpoint's form would depend on that."""
    for name, parameter in model.named_parameters():
        if EXPERTS in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def parameters_of(chunks: Sequence[PolicyModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the whole model: layers and experts are counted from its first."""
    return {whole_name(chunk, name): parameter for chunk in chunks for name, parameter in chunk.named_parameters()}


def whole_name(chunk: PolicyModel, name: str) -> str:
    """A chunk's name of a parameter, as the whole model would call it."""
    if not name.startswith("decoder.layers."):
        return name
    head, _, local, rest = name.split(".", 3)
    layer = chunk.decoder.layers[int(local)]
    if rest.startswith(EXPERTS):
        expert, rest = rest.removeprefix(EXPERTS).split(".", 1)
        rest = f"{EXPERTS}{layer.mlp.local_expert_indices[int(expert)]}.{rest}"
    return f"{head}.layers.{layer.layer_number - 1}.{rest}"
