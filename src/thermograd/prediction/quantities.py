"""What is predicted, each with its unit and what it is in words."""

from __future__ import annotations

__all__ = ["QUANTITIES"]

QUANTITIES: dict[str, tuple[str, str]] = {
    "loss": ("loss", "mean objective (training loss with weight decay) over the last 30% of the steps"),
    "excess_loss": ("loss", "its excess over the bottom"),
    "excess_loss_stderr": ("loss", "standard error of the excess: statistical, and half of what is extrapolated"),
    "fluctuation": ("loss", "part of the excess that the noise spreads the weights by"),
    "mean_excess": ("loss", "part of the excess that is where the mean of the weights stands"),
    "level": ("1", "fluctuation in units of the run's own"),
    "stationary_excess_loss": ("loss", "excess when all modes have equilibrated: the loss floor"),
    "stationary_excess_loss_stderr": ("loss", "standard error of the loss floor"),
    "equilibration_steps": ("steps", "steps until the excess stays within 10% of its last value"),
    "loss_variance": ("loss^2", "variance in time of the training loss over all samples"),
    "loss_variance_stderr": ("loss^2", "its standard error"),
    "minibatch_loss_variance": ("loss^2", "variance of the minibatch loss from step to step"),
    "minibatch_loss_variance_stderr": ("loss^2", "its standard error"),
    "diffusion_exponent": ("1", "exponent of the mean-squared displacement between a tenth of the steps and all"),
    "distance": ("weight", "root mean-squared distance travelled in the steps, from stationarity, without drift"),
    "distance_stderr": ("weight", "its standard error"),
    "sharpness_margin": ("1", "largest stable curvature over the largest curvature; unstable below 1"),
    "noise_gain": ("1", "noise fed back by the spread it causes; the mean square diverges above 1"),
    "escape_steps": ("steps", "Kramers time to leave the quadratic region along one of the sharpest directions"),
    "decay_drop": ("loss", "drop of the loss floor when the learning rate is divided by ten"),
    "decay_drop_stderr": ("loss", "its standard error"),
    "critical_batch_size": ("samples", "batch above which curvature and not noise limits the learning rate"),
    "gradient_noise_scale": ("samples", "Tr C / |gradient|^2 at the last weights"),
}
