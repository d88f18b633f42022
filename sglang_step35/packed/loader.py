"""SGLang's model loader for GGUF files of Step-3.5."""

import torch
from sglang.srt.model_loader.loader import (
    GGUFModelLoader,
    _get_quantization_config,
    _initialize_model,
    device_loading_context,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch import nn

from sglang_step35.checkpoint.gguf import GGUFFiles


class Step35GGUFLoader(GGUFModelLoader):
    """Kept: SGLang's order of construction, loading and post-processing. Replaced: the reader, for split files,
    llama.cpp's conventions, weights that stay in the mapped file and errors that name file and tensor."""

    def load_model(self, *, model_config, device_config) -> nn.Module:
        # A config.json beside the file names the folder; the draft's quantisation is settled before the file is seen.
        model_config.hf_config._name_or_path = model_config.model_path
        model_config.quantization = "gguf"
        device = torch.device(device_config.device)
        quant_config = _get_quantization_config(model_config, self.load_config)
        with set_default_torch_dtype(model_config.dtype):
            with device:
                model = _initialize_model(model_config, self.load_config, quant_config)
            model.load_weights(GGUFFiles(model_config.model_path).tensors())
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if method is not None:
                    with device_loading_context(module, device):
                        method.process_weights_after_loading(module)
        return model.eval()
