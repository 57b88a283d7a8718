"""The callbacks that stand in every run, by the name of their group in a configuration."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.data_stream import DataStream
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.life_sign import LifeSign
from agssd.callbacks.mask_ratio import MaskRatioSchedule
from agssd.callbacks.non_finite import NonFinite
from agssd.callbacks.online_probe import OnlineProbe
from agssd.callbacks.throughput import Throughput
from agssd.callbacks.view_panels import ViewPanels
from agssd.callbacks.watchdog import Watchdog

STANDING: dict[str, type[Callback]] = {
    "ema_teacher": EMATeacher,
    "mask_ratio": MaskRatioSchedule,
    "collapse_monitor": CollapseMonitor,
    "non_finite": NonFinite,
    "view_panels": ViewPanels,
    "throughput": Throughput,
    "data_stream": DataStream,
    "online_probe": OnlineProbe,
    "watchdog": Watchdog,
    "life_sign": LifeSign,
}
