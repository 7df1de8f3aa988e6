"""Diffusion and flow: schedules and single steps, samplers, guidance, and the loop over time steps."""

from vq4dit_jax.diffusion.schedule import (
    Schedule,
    ddim_step,
    ddpm_gaussian,
    ddpm_step,
    dpmpp_2m_step,
    make_schedule,
    predict_x0,
    respaced_timesteps,
)

__all__ = [
    "Schedule",
    "ddim_step",
    "ddpm_gaussian",
    "ddpm_step",
    "dpmpp_2m_step",
    "make_schedule",
    "predict_x0",
    "respaced_timesteps",
]
