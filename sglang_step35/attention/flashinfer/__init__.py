"""FlashInfer on CUDA: SGLang's backend and kernels, with plans of our own."""
