"""bd3_scale: block discrete denoising diffusion language models (BD3-LMs), trained at scale."""

__version__ = "0.1.0"
