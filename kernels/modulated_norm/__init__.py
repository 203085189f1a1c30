"""Layer norm whose scale and shift depend on the denoising step (adaLN)."""
