from mmengine.config import Config

from kd_dense.analysis.palette import class_colours


def config(scope: str, **dataset) -> Config:
    return Config(dict(default_scope=scope, val_dataloader=dict(dataset=dataset)))


def test_colours_of_a_toolbox_data_set():
    colours = class_colours(config('mmseg', type='CityscapesDataset'))
    assert len(colours) == 19
    assert colours['road'] == (128, 64, 128)


def test_a_wrapped_data_set_and_its_own_metainfo():
    meta = dict(classes=('a', 'b'), palette=[[1, 2, 3], [4, 5, 6]])
    inner = dict(type='BaseSegDataset', metainfo=meta)
    assert class_colours(config('mmseg', type='RepeatDataset', dataset=inner)) == {'a': (1, 2, 3), 'b': (4, 5, 6)}


def test_no_legend_without_colours():
    assert class_colours(config('mmdet', type='CocoDataset')) == {}
    assert class_colours(config('mmseg', type='ADE20KDataset')) == {}  # 150 classes
    assert class_colours(config('mmseg', type='BaseSegDataset', metainfo=dict(classes=('a', 'b')))) == {}
    assert class_colours(Config(dict(student='yolo11n.yaml'))) == {}
