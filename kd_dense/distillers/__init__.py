"""Distillers: one published method per file."""

from kd_dense.distillers.base import Distiller, TapPair
from kd_dense.distillers.cakd import CAKD
from kd_dense.distillers.cwd import CWD
from kd_dense.distillers.feature_mimic import FeatureMimic
from kd_dense.distillers.logit_kd import LogitKD
from kd_dense.distillers.native import Native
from kd_dense.distillers.nfd import NFD
from kd_dense.distillers.transkd import TransKD

__all__ = ['CAKD', 'CWD', 'NFD', 'Distiller', 'FeatureMimic', 'LogitKD', 'Native', 'TapPair', 'TransKD']
