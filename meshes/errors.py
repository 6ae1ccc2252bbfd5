"""The error of this package."""


class PlanError(ValueError):
    """A plan that cannot be laid on the devices or the model at hand."""
