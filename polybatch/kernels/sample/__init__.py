"""sample: logits to tokens without leaving the device.

Contract, for every variant:

    sample(logits, temperature, top_k, top_p, min_p, uniform) -> tokens, finite

    logits: [L, V], float32 or a 16-bit float that is widened first; not changed
    temperature: [L] float32; 0 is greedy. top_k: [L] int32; 0 is off
    top_p, min_p, uniform: [L] float64; uniform is in [0, 1), the row's random number
    tokens: [L] int32, always in [0, V). finite: [L] int32, 0 where the row's best logit is NaN or infinite:
        that row must fail and its token means nothing

    What a token is stands in `polybatch.sampling.sampler`: logits / temperature, then top-k, top-p of what
    top-k left, min-p relative to the best; equals in the order of their ids; a draw is the inverse of the
    distribution function at `uniform`, best first where truncated, by id where not. A row's token depends
    on that row alone.
Sources: Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

from polybatch.kernels.sample.reference import sample
from polybatch.kernels.sample.work import arrays, fill, is_device_samplable

__all__ = ["arrays", "fill", "is_device_samplable", "sample"]
