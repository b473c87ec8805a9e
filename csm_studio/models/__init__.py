"""The models in MLX. Importing them turns on the fast BLAS where MLX runs on a Linux CPU."""

from csm_studio.fast_blas import enable

enable()
