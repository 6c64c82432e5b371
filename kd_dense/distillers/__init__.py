"""Distillers: one published method per file."""

from kd_dense.distillers.base import Distiller, TapPair
from kd_dense.distillers.box_guided_mimic import BoxGuidedMimic
from kd_dense.distillers.cakd import CAKD
from kd_dense.distillers.cwd import CWD
from kd_dense.distillers.dpk import DPK
from kd_dense.distillers.feature_mimic import FeatureMimic
from kd_dense.distillers.localization_kd import LocalizationKD
from kd_dense.distillers.logit_kd import LogitKD
from kd_dense.distillers.mgd import MGD
from kd_dense.distillers.native import Native
from kd_dense.distillers.nfd import NFD
from kd_dense.distillers.pkd import PKD
from kd_dense.distillers.query_kd import QueryKD
from kd_dense.distillers.rkd import RKD
from kd_dense.distillers.roi_kd import RoIKD
from kd_dense.distillers.transkd import TransKD

__all__ = [
    'CAKD',
    'CWD',
    'DPK',
    'MGD',
    'NFD',
    'PKD',
    'RKD',
    'BoxGuidedMimic',
    'Distiller',
    'FeatureMimic',
    'LocalizationKD',
    'LogitKD',
    'Native',
    'QueryKD',
    'RoIKD',
    'TapPair',
    'TransKD',
]
