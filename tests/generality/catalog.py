"""The models that the sweep covers, and those that it can not, with the reason; docs/supported_models.md is made of it.

``python -m tests.generality.catalog`` writes that page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).parents[2] / 'docs' / 'supported_models.md'

#: Why a model has no ``LogitKD``; parts of the sentence that kd_dense itself gives.
TWO_STAGE = 'the class predictions of a two-stage detector belong to its proposals, not to positions'
CHOSEN = 'are chosen anew in each image'
NO_CONV_SEG = 'has no conv_seg that gives a logit per pixel and class'
NO_BBOX_HEAD = 'has no bbox_head'
CORNERS = 'predicts corners, not boxes with classes'
TWICE = 'runs a different number of times in training than in the plain forward'
PACKED = 'packs classes, objectness and boxes into one map'


@dataclass(frozen=True)
class Model:
    """One stock config and what can be distilled into it.

    Args:
        name: the class that the config stands for: a decode head, dense head, detector or backbone.
        config: path below the toolbox's own configs.
        no_logits: part of the sentence with which ``LogitKD`` refuses; '' where it works.
        factors: by what the widths of student and teacher are divided; equal ones, 1, where a model has but one width.
        taps: of ``FeatureMimic``.
        size: of the images, ``(H, W)``.
        options: entries of the narrowed config that have to be as they were.
        init: see :func:`tests.generality.shrink.one_step`.
        masks: give the objects masks.
        sample: part of the quick sweep.
        package: what the toolbox wants to be installed for the training of this model, as it is imported.
    """

    name: str
    config: str
    no_logits: str = ''
    factors: tuple[int, int] = (16, 8)
    taps: str | dict = ''
    size: tuple[int, int] = (128, 128)
    options: dict = field(default_factory=dict)
    init: bool = False
    masks: bool = True
    sample: bool = False
    package: str = ''


def _base(name: str, config: str, no_logits: str = '', **arguments) -> Model:
    return Model(name, f'_base_/models/{config}.py', no_logits, **arguments)


_TRAINING_ONLY = dict(student='backbone:1', teacher='backbone')
SEGMENTORS = (
    _base('ANNHead', 'ann_r50-d8'),
    _base('APCHead', 'apcnet_r50-d8'),
    _base('FCNHead', 'bisenetv1_r18-d32'),
    _base('BiSeNetV2', 'bisenetv2', factors=(4, 2)),
    _base('CCHead', 'ccnet_r50-d8'),
    _base('CGNet', 'cgnet', factors=(4, 2)),
    _base('DAHead', 'danet_r50-d8'),
    _base('ASPPHead', 'deeplabv3_r50-d8'),
    _base('UNet', 'deeplabv3_unet_s5-d16'),
    _base('DepthwiseSeparableASPPHead', 'deeplabv3plus_r50-d8'),
    _base('DMHead', 'dmnet_r50-d8'),
    _base('DNLHead', 'dnl_r50-d8'),
    _base('DPTHead', 'dpt_vit-b16'),
    _base('EMAHead', 'emanet_r50-d8'),
    _base('EncHead', 'encnet_r50-d8'),
    _base('ERFNet', 'erfnet_fcn', factors=(4, 2)),
    _base('DepthwiseSeparableFCNHead', 'fast_scnn'),
    _base('JPU', 'fastfcn_r50-d32_jpu_psp'),
    _base('HRNet', 'fcn_hr18'),
    _base('ResNetV1c', 'fcn_r50-d8'),
    _base('FPNHead', 'fpn_r50'),
    _base('GCHead', 'gcnet_r50-d8'),
    _base('ICNet', 'icnet_r50-d8'),
    _base('ISAHead', 'isanet_r50-d8'),
    _base('LRASPPHead', 'lraspp_m-v3-d8', factors=(1, 1), size=(400, 400)),
    _base('NLHead', 'nonlocal_r50-d8'),
    _base('OCRHead', 'ocrnet_r50-d8'),
    _base('PointHead', 'pointrend_r50', NO_CONV_SEG),
    _base('PSAHead', 'psanet_r50-d8'),
    _base('PSPHead', 'pspnet_r50-d8', sample=True),
    _base('SegformerHead', 'segformer_mit-b0', sample=True),
    _base('SegmenterMaskTransformerHead', 'segmenter_vit-b16_mask'),
    _base('SETRMLAHead', 'setr_mla'),
    _base('SETRUPHead', 'setr_pup'),
    _base('STDCHead', 'stdc'),
    _base('PCPVT', 'twins_pcpvt-s_fpn'),
    _base('UPerHead', 'upernet_swin'),
    _base('BEiT', 'upernet_beit'),
    _base('VisionTransformer', 'upernet_vit-b16_ln_mln'),
    Model('MAE', 'mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py'),
    Model(
        'DDRHead', 'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py', taps=_TRAINING_ONLY, sample=True
    ),
    Model('PIDHead', 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', taps=_TRAINING_ONLY),
    Model('IterativeDecodeHead', 'knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py', NO_CONV_SEG),
    Model('KernelUpdateHead', 'knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py', NO_CONV_SEG),
    Model('Mask2FormerHead', 'mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py', NO_CONV_SEG),
    Model('MaskFormerHead', 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py', NO_CONV_SEG),
    Model('LightHamHead', 'segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'),
    Model('ResNeSt', 'resnest/resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024.py'),
    Model('MobileNetV2', 'mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024.py', factors=(1, 1)),
    Model('SVT', 'twins/twins_svt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py'),
)

_GN = dict(factors=(8, 4), size=(256, 256))  # group norm of 32 groups, also on the coarsest level
_OWN = dict(factors=(1, 1))
DETECTORS = (
    Model('ATSSHead', 'atss/atss_r50_fpn_1x_coco.py', **_GN),
    Model('AutoAssignHead', 'autoassign/autoassign_r50-caffe_fpn_1x_coco.py', **_GN),
    Model('CascadeRCNN', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('CascadeRPNHead', 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py', TWO_STAGE),
    Model('CenterNetUpdateHead', 'centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py', **_GN),
    Model('CenterNetHead', 'centernet/centernet_r18_8xb16-crop512-140e_coco.py', 'gives a heat map after the sigmoid'),
    Model('CentripetalHead', 'centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py', CORNERS),
    Model('CornerHead', 'cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py', CORNERS),
    Model(
        'CondInstBboxHead',
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        TWICE,
        options={'mask_head.mask_feature_head.out_channels': 8, 'mask_head.feat_channels': 8},
        **_GN,
    ),
    Model('ConditionalDETRHead', 'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py', **_OWN),
    Model('CrowdDet', 'crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py', TWO_STAGE),
    Model('DABDETRHead', 'dab_detr/dab-detr_r50_8xb2-50e_coco.py'),
    Model('DDODHead', 'ddod/ddod_r50_fpn_1x_coco.py', factors=(8, 4), size=(384, 384)),
    Model('DDQDETRHead', 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', CHOSEN, init=True),
    Model('DeformableDETRHead', 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', init=True),
    Model(
        'DeformableDETR',
        'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
        CHOSEN,
        init=True,
        **_OWN,
    ),
    Model('DetectoRS_ResNet', 'detectors/htc_r50-rfp_1x_coco.py', TWO_STAGE, init=True),
    Model('DETRHead', 'detr/detr_r50_8xb2-150e_coco.py', sample=True),
    Model('DINOHead', 'dino/dino-4scale_r50_8xb2-12e_coco.py', CHOSEN, init=True, **_OWN),
    Model('DoubleConvFCBBoxHead', 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('DyHead', 'dyhead/atss_r50_fpn_dyhead_1x_coco.py', **_GN),
    Model('DynamicRoIHead', 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('FastRCNN', 'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('FasterRCNN', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', TWO_STAGE, sample=True),
    Model('FCOSHead', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', **_GN),
    Model('FoveaHead', 'foveabox/fovea_r50_fpn_4xb4-1x_coco.py'),
    Model('FreeAnchorRetinaHead', 'free_anchor/freeanchor_r50_fpn_1x_coco.py'),
    Model('FSAFHead', 'fsaf/fsaf_r50_fpn_1x_coco.py'),
    Model('GFLHead', 'gfl/gfl_r50_fpn_1x_coco.py', sample=True, **_GN),
    Model('GridRCNN', 'grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py', TWO_STAGE),
    Model('GenericRoIExtractor', 'groie/mask-rcnn_r50_fpn_groie_1x_coco.py', TWO_STAGE),
    Model('GARetinaHead', 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py', 'masked_im2col'),
    Model('GARPNHead', 'guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('HRNet', 'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py', TWO_STAGE),
    Model('HybridTaskCascade', 'htc/htc_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('BFP', 'libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py'),
    Model('Mask2FormerHead', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', NO_BBOX_HEAD),
    Model('MaskFormerFusionHead', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', NO_BBOX_HEAD),
    Model('MaskRCNN', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('MaskFormerHead', 'maskformer/maskformer_r50_ms-16xb1-75e_coco.py', NO_BBOX_HEAD),
    Model('MaskScoringRCNN', 'ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('NASFCOSHead', 'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py'),
    Model('RetinaSepBNHead', 'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py'),
    Model('PAAHead', 'paa/paa_r50_fpn_1x_coco.py', package='sklearn', **_GN),
    Model('PAFPN', 'pafpn/faster-rcnn_r50_pafpn_1x_coco.py', TWO_STAGE),
    Model('PanopticFPN', 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('PISARetinaHead', 'pisa/retinanet-r50_fpn_pisa_1x_coco.py'),
    Model('PISASSDHead', 'pisa/ssd300_pisa_coco.py', size=(300, 300), init=True, **_OWN),
    Model('PointRend', 'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py', TWO_STAGE),
    Model('PyramidVisionTransformer', 'pvt/retinanet_pvt-t_fpn_1x_coco.py'),
    Model('QueryInst', 'queryinst/queryinst_r50_fpn_1x_coco.py', TWO_STAGE, factors=(8, 4), init=True),
    Model('RegNet', 'regnet/retinanet_regnetx-800MF_fpn_1x_coco.py', **_OWN),
    Model('RepPointsHead', 'reppoints/reppoints-moment_r50_fpn_1x_coco.py'),
    Model('Res2Net', 'res2net/faster-rcnn_res2net-101_fpn_2x_coco.py', TWO_STAGE),
    Model('RetinaHead', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
    Model('RPNHead', 'rpn/rpn_r50_fpn_1x_coco.py'),
    Model('RTMDetSepBNHead', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py', factors=(8, 4), masks=False),
    Model('RTMDetInsSepBNHead', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', factors=(8, 4)),
    Model('SABLRetinaHead', 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'),
    Model('SABLHead', 'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('SCNet', 'scnet/scnet_r50_fpn_1x_coco.py', TWO_STAGE),
    Model('SOLOHead', 'solo/solo_r50_fpn_1x_coco.py', NO_BBOX_HEAD),
    Model('DecoupledSOLOHead', 'solo/decoupled-solo_r50_fpn_1x_coco.py', NO_BBOX_HEAD),
    Model('DecoupledSOLOLightHead', 'solo/decoupled-solo-light_r50_fpn_3x_coco.py', NO_BBOX_HEAD),
    Model('SOLOV2Head', 'solov2/solov2_r50_fpn_1x_coco.py', NO_BBOX_HEAD),
    Model('SparseRCNN', 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', TWO_STAGE, factors=(8, 4), init=True),
    Model('SSDHead', 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', size=(320, 320), **_OWN),
    Model('SwinTransformer', 'swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'),
    Model('TOODHead', 'tood/tood_r50_fpn_1x_coco.py', 'gives aligned class probabilities, not logits', **_GN),
    Model('VFNetHead', 'vfnet/vfnet_r50_fpn_1x_coco.py', **_GN),
    Model('YOLACTHead', 'yolact/yolact_r50_1xb8-55e_coco.py', TWICE),
    Model('YOLOV3Head', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', PACKED, **_OWN),
    Model('YOLOFHead', 'yolof/yolof_r50-c5_8xb8-1x_coco.py'),
    Model('YOLOXHead', 'yolox/yolox_tiny_8xb8-300e_coco.py', factors=(4, 2)),
)

_PART = 'a part or base class of others, no model of its own'
_OWN_TEACHER = "joins student and teacher itself; use the student's own config with kd_dense"
_TEXT = 'needs the package transformers and the weights of a language model, which are downloaded'
#: Not in the sweep -> reason.
UNCOVERED = {
    'mmseg': {
        'SideAdapterCLIPHead': "SAN: needs the weights of CLIP's text encoder, whose width can not be reduced",
        'VPDDepthHead': 'depth estimation on Stable Diffusion, whose packages mmseg lists as optional',
        'KernelUpdator': _PART,
        **dict.fromkeys(('PoolFormer', 'ConvNeXt'), 'backbones of the package mmpretrain'),
    },
    'mmdet': {
        **dict.fromkeys(('AnchorFreeHead', 'AnchorHead', 'GuidedAnchorHead', 'FeatureAdaption'), _PART),
        **dict.fromkeys(('YOLACTProtonet', 'StageCascadeRPNHead', 'EmbeddingRPNHead', 'CondInstMaskHead'), _PART),
        **dict.fromkeys(('RTMDetHead', 'RTMDetInsHead'), _PART),
        **dict.fromkeys(('BoxInstBboxHead', 'BoxInstMaskHead'), 'BoxInst: needs the package scikit-image'),
        **dict.fromkeys(('LDHead', 'LADHead'), _OWN_TEACHER),
        **dict.fromkeys(('GroundingDINOHead', 'ATSSVLFusionHead'), _TEXT),
        'TridentFasterRCNN': 'its backbone gives three feature maps for each image in training and one in evaluation',
        'Detectron2Wrapper': 'needs the package detectron2',
        'SoftTeacher': 'trains two detectors on images without labels; use the config of its detector',
    },
}

#: Parts of the names of Ultralytics' model YAMLs that are not in the sweep -> reason.
YOLO_UNCOVERED = {
    '-cls': 'image classification: no dense prediction',
    '-pose': 'keypoints: kd_dense trains detection and instance segmentation',
    '-obb': 'rotated boxes: kd_dense trains detection and instance segmentation',
    '-depth': 'depth: kd_dense trains detection and instance segmentation',
    '-sem': 'semantic segmentation: kd_dense trains detection and instance segmentation; use MMSegmentation',
    'rtdetr': 'RT-DETR: a head of queries, which kd_dense does not train; distil with MMDetection',
    'yoloe': 'open vocabulary: trained with text prompts',
    'world': 'open vocabulary: trained with text prompts',
}


def _table(models: tuple[Model, ...]) -> list[str]:
    lines = ['| class | config | `FeatureMimic` | `LogitKD` |', '| --- | --- | --- | --- |']
    for model in models:
        taps = f' with taps `{model.taps}`' if model.taps else ''
        logits = f'no: {model.no_logits}' if model.no_logits else 'yes'
        lines.append(f'| `{model.name}` | `{model.config}` | yes{taps} | {logits} |')
    return lines


def _families() -> list[str]:
    from tests.generality.families import FAMILIES  # which is made of the models above

    lines = ['| family | methods for its head |', '| --- | --- |']
    for family in FAMILIES:
        methods = []
        for kind, options in family.heads.items():
            given = ', '.join(f'{name}={value!r}' for name, value in options.items())
            methods.append(f'`{kind}`' + (f' with `{given}`' if given else ''))
        lines.append(f'| {family.name} | {", ".join(methods)} |')
    return lines


def page() -> str:
    """The text of docs/supported_models.md."""
    lines = [
        '# Supported models',
        '',
        'This page is written by `python -m tests.generality.catalog`. The tests in `tests/generality` build each',
        'model at a fraction of its width, with a teacher of twice that width where the model has widths to choose,',
        'take one training step, and check the losses and the gradients of student and connectors. A class may be a',
        'head, a detector, a neck or a backbone; the configs are those that the toolboxes bring along.',
        '',
        '`FeatureMimic` stands for all methods that compare features, `LogitKD` for those that compare class',
        'predictions. Where `LogitKD` is not there, kd_dense says why, in a sentence that contains the words in the',
        'table.',
        '',
        '## MMSegmentation',
        '',
        *_table(SEGMENTORS),
        '',
        'DDRNet and PIDNet return more maps in training than in evaluation: tap student and teacher differently.',
        '',
        '## MMDetection',
        '',
        *_table(DETECTORS),
        '',
        'mmcv has no CPU kernel for the masked convolution of `GARetinaHead` (`masked_im2col`). `PAAHead` fits',
        'mixtures by scikit-learn, which has to be installed for it.',
        '',
        'These families also take steps with features of the neck and the methods for their heads together, on images',
        'of several sizes one after another, of mixed aspect ratio in one batch, and without any object:',
        '',
        *_families(),
        '',
        'RTMDet and YOLOX do so on batches that are resized inside the model. Teachers of another family are tried',
        'with features: Faster R-CNN, Swin and PVTv2 for ResNets, a ResNet for PVTv2, DINO for RTMDet. Their levels',
        'go together by stride.',
        '',
        '## Ultralytics YOLO',
        '',
        'Both work with the model YAMLs of detection and instance segmentation of the families v3, v5, v6, v8, v9,',
        'v10, 11, 12 and 26, with all their variants (`-p2`, `-p6`, `-ghost`, `-spp`, `-tiny`, `-seg`).',
        'A detector of MMDetection may be the teacher, for features.',
        '',
        '## Not covered',
        '',
        '| toolbox | class or YAML | reason |',
        '| --- | --- | --- |',
        *(f'| {box} | `{name}` | {why} |' for box, reasons in UNCOVERED.items() for name, why in reasons.items()),
        *(f'| ultralytics | `*{name}*` | {why} |' for name, why in YOLO_UNCOVERED.items()),
    ]
    return '\n'.join([*lines, ''])


if __name__ == '__main__':
    PAGE.write_text(page())
