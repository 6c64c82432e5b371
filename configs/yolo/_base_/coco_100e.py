# COCO 2017 as Ultralytics lays it out (its own coco.yaml: datasets/coco), 100 epochs from scratch.
# Another place for the images: --cfg-options data=path/to/coco.yaml
data = 'coco.yaml'

# Any training argument of Ultralytics may stand here.
train = dict(
    epochs=100,
    imgsz=640,
    # Images per step over all GPUs. Gradients are accumulated up to nbs=64, so a smaller number trains alike, only
    # slower.
    batch=64,
    # device='0,1,2,3',  # several GPUs
    seed=0,
)
