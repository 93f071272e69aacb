"""Observers, on torchao's base classes. Subclass `TemporalObserver` to add an estimator keyed on timestep."""

from tfmq_fx.observers.float8 import Float8FakeQuantize
from tfmq_fx.observers.minmax import TemporalMinMaxObserver
from tfmq_fx.observers.residual import ResidualFakeQuantize
from tfmq_fx.observers.samples import TemporalKLObserver, TemporalMSEObserver, TemporalPercentileObserver
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.temporal import TemporalObserver
from tfmq_fx.observers.token import TokenFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize

__all__ = [
    "Float8FakeQuantize",
    "PerChannelWeightFakeQuantize",
    "ResidualFakeQuantize",
    "StaticFakeQuantize",
    "TemporalKLObserver",
    "TemporalMSEObserver",
    "TemporalMinMaxObserver",
    "TemporalObserver",
    "TemporalPercentileObserver",
    "TokenFakeQuantize",
]
