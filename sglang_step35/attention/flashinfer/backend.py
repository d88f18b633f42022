"""FlashInfer for Step-3.5 on CUDA: SGLang's backend and kernels, planned for the rows each pass really has.

SGLang 0.5.23 takes a verify window of a sliding layer from a request's first keys, runs the ragged prefill without a
window, and plans full layers with the sliding layers' heads. Here a pass is described once, by the rows it computes,
and each kind of layer gets a plan of its own (`plan.py`). `hooks/` puts this class behind
`--attention-backend flashinfer` for our models.
"""

import torch
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from sglang_step35.attention.flashinfer.plan import DecodePlanner, PrefillPlanner, layer_kinds

# Query heads per key/value head that FlashInfer's decode kernel without tensor cores is compiled for. Sliding layers
# have 12.
PLAIN_DECODE_GROUPS = (1, 2, 3, 4, 6, 8, 16)


class Step35FlashInferBackend(stock.FlashInferAttnBackend):
    """Kept: wrappers, graphs and kernels of SGLang's backend; replaced: the planners, the graph buffers' sizes, and
    the ragged prefill, which knows no window.

    One instance serves one runner, target or draft, in every forward mode.
    """

    def __init__(self, model_runner, init_new_workspace: bool = False):
        super().__init__(model_runner, init_new_workspace=init_new_workspace)
        self._refuse_what_is_not_planned(model_runner)
        self.use_paged = True
        spec = model_runner.model_config.hf_text_config.spec()
        layers = spec.mtp_layers if model_runner.is_draft_worker else spec.layers
        self.kinds = layer_kinds(layers, get_parallel().attn_tp_size)[-self.num_wrappers :]
        self._require_tensor_cores()
        self.indices_updater_prefill = PrefillPlanner(model_runner, self)
        self.indices_updater_decode = DecodePlanner(model_runner, self)

    def _refuse_what_is_not_planned(self, runner) -> None:
        # SGLang's constructor checks the KV dtype for its own class only.
        if runner.prefill_attention_backend_str == "flashinfer":
            self._check_kv_attention_access("prefill", self.prefill_kv_access)
        if runner.decode_attention_backend_str == "flashinfer":
            self._check_kv_attention_access("decode", self.decode_kv_access)
        if self.prefill_uses_dequant_workspace or self.enable_mis:
            raise ValueError("FP4 KV and multi-item scoring do not work with sliding layers on flashinfer")

    def _require_tensor_cores(self) -> None:
        """SGLang decides by the full layers' group of 8; a group of 12 exists with tensor cores only."""
        groups = {kind.group for kind in self.kinds if kind is not None}
        if self.decode_use_tensor_cores or groups <= set(PLAIN_DECODE_GROUPS):
            return
        self.decode_use_tensor_cores = True
        self.decode_wrappers = [
            stock.BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer, "NHD", backend=self.decode_backend, use_tensor_cores=True
            )
            for _ in self.kinds
        ]

    def init_forward_metadata(self, forward_batch) -> None:
        """As SGLang's, but a draft extend keeps its full width where it begins before position 0."""
        if not forward_batch.forward_mode.is_draft_extend_v2():
            return super().init_forward_metadata(forward_batch)
        self.indices_updater_prefill.update(
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            forward_batch.seq_lens_cpu,
            forward_batch.seq_lens_sum,
            prefix_lens=None,
            prefill_wrappers=self.prefill_wrappers_paged,
            use_ragged=False,
            encoder_lens=None,
            spec_info=forward_batch.spec_info,
            plan=forward_batch.kv_loc_plan,
        )
        written = None
        if self.use_sliding_window_kv_pool:
            written = self.kv_index_translator.write_ids(forward_batch, IdSpaceKind.SLIDING_WINDOW)
        self.forward_metadata = stock.PrefillMetadata(
            self.prefill_wrappers_paged, False, False, swa_out_cache_loc=written
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf=None) -> None:
        """Buffers of the captured passes: max_bs requests with max_num_tokens rows together.

        SGLang sizes both index buffers and a mask by rows times context, some gigabytes at 256K.
        """
        device = self.workspace_buffer.device
        self.cuda_graph_kv_indices = []
        for kind in self.kinds:
            reach = self.max_context_len if kind is None or kind.earlier < 0 else kind.earlier
            size = 1 if kind is None else max_bs * reach + max_num_tokens
            self.cuda_graph_kv_indices.append(torch.zeros(size, dtype=torch.int32, device=device))
        self.cuda_graph_swa_out_cache_loc = None
        if self.use_sliding_window_kv_pool:
            self.cuda_graph_swa_out_cache_loc = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.cuda_graph_qo_indptr = [row.clone() for row in self.kv_indptr]
        self._grow_workspace(max_bs, max_num_tokens)

    def _grow_workspace(self, max_bs: int, max_num_tokens: int) -> None:
        """Graph plans take the largest grid of their shape; 12 heads a group outgrow SGLang's default workspace."""
        size = max(
            self._full_cg_prefill_workspace_bytes(
                max_bs,
                max_num_tokens,
                num_qo_heads=kind.num_qo_heads,
                num_kv_heads=kind.num_kv_heads,
                head_dim=kind.head_dim,
                device=self.workspace_buffer.device,
            )
            for kind in self.kinds
            if kind is not None
        )
        if size > self.workspace_buffer.numel():
            self.workspace_buffer = torch.empty(size, dtype=torch.uint8, device=self.workspace_buffer.device)

    @property
    def verify_mask(self) -> VerifyMask:
        """None is read: nothing has to be built."""
        return VerifyMask(self.workspace_buffer[:0], TreeMaskMode.QLEN_ONLY, max_bs=0, is_read=False)

    def _create_prefill_wrappers(self, bs: int, use_custom_mask: bool = False) -> list:
        # A chain is causal: the tree mask of SGLang's verify input says nothing else, and hides the window.
        return super()._create_prefill_wrappers(bs, use_custom_mask=False)
