# BCCD (blood cells, 3 classes, 205 training images), converted to Ultralytics' layout by
# tools/dataset_converters/coco2yolo.py. Another place for the images: --cfg-options data=path/to/data.yaml
data = 'data/bccd_yolo/data.yaml'
# COCO annotations of the validation images: tools/test.py then prints the official COCO numbers as well.
coco_json = 'data/bccd/annotations/val.json'

train = dict(
    epochs=100,
    imgsz=320,  # the cells are large: half of the 640x480 pixels are enough, at a quarter of the cost
    batch=16,
    nbs=16,  # 13 steps per epoch; accumulating up to 64 images would leave 3
    seed=0,
)
