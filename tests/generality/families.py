"""The families of detectors, and the methods for their heads; docs/supported_models.md has the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.generality.catalog import DETECTORS, Model

_MODELS = {model.name: model for model in DETECTORS}
#: Methods for dense heads, and parts of the sentences with which they refuse others.
_DENSE = {'LogitKD': {}, 'LocalizationKD': {}}
_NOT_DENSE = {'LogitKD': 'belong to its proposals', 'LocalizationKD': 'belong to its proposals, not to cells'}
_NO_ROIS = {'RoIKD': 'has no RoI head'}
_NO_QUERIES = {'QueryKD': 'none of MMDetection'}


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: as its paper calls it.
        model: its entry in the catalog.
        heads: type -> options, of the methods for its head.
        refused: type -> part of the sentence with which a method refuses it.
        quick: part of the quick tests.
    """

    name: str
    model: Model
    heads: dict[str, dict]
    refused: dict[str, str] = field(default_factory=dict)
    quick: bool = False


def _dense(name: str, entry: str, quick: bool = False) -> Family:
    return Family(name, _MODELS[entry], _DENSE, _NO_ROIS | _NO_QUERIES, quick)


_ROIS = {'RoIKD': {}}
_MASKS = {'RoIKD': dict(mask_weight=1.0)}
_TWO_STAGE = _NOT_DENSE | _NO_QUERIES
_OF_QUERIES = {'LocalizationKD': 'belong to its queries, not to cells'} | _NO_ROIS
FAMILIES = (
    _dense('RetinaNet', 'RetinaHead', quick=True),
    _dense('FCOS', 'FCOSHead'),
    _dense('ATSS', 'ATSSHead'),
    _dense('GFL', 'GFLHead'),
    # Its classes are aligned probabilities: the main region is weighed by nothing.
    Family(
        'TOOD',
        _MODELS['TOODHead'],
        {'LocalizationKD': dict(scores='none')},
        _NO_ROIS | _NO_QUERIES | {'LogitKD': _MODELS['TOODHead'].no_logits},
    ),
    _dense('RTMDet', 'RTMDetSepBNHead'),
    _dense('YOLOX', 'YOLOXHead'),
    Family('Faster R-CNN', _MODELS['FasterRCNN'], _ROIS, _TWO_STAGE, quick=True),
    Family('Cascade R-CNN', _MODELS['CascadeRCNN'], _MASKS, _TWO_STAGE),
    Family('Mask R-CNN', _MODELS['MaskRCNN'], _MASKS, _TWO_STAGE),
    Family('DINO', _MODELS['DINOHead'], {'QueryKD': dict(layers='all')}, _OF_QUERIES | {'LogitKD': 'are chosen anew'}),
    Family('Deformable DETR', _MODELS['DeformableDETRHead'], {'QueryKD': {}, 'LogitKD': {}}, _OF_QUERIES),
)
