"""Run a network that stops when it is sure, without PyTorch: each image goes no further than it must.

    lightning-stitch export solar solar.onnx --per_stage
    python examples/run_stages.py solar.stage1.onnx solar.stage2.onnx -- IMAGE...

`pip install onnxruntime pillow` is all that it needs.
"""

import json
import sys

import numpy
import onnxruntime
from PIL import Image


def predict(sessions, images):
    """Probabilities of images in [0, 1], and the stage at which each stopped."""
    rows, given, answers, stops = numpy.arange(len(images)), {"images": images}, {}, {}
    for stage, session in enumerate(sessions):
        inputs = {node.name: given[node.name] for node in session.get_inputs()}
        names = [node.name for node in session.get_outputs()]
        outputs, sure, *carried = session.run(None, inputs)
        answers |= dict(zip(rows[sure], outputs[sure], strict=True))
        stops |= dict.fromkeys(rows[sure], stage)
        if sure.all():
            break
        given |= dict(zip(names[2:], carried, strict=True))
        rows, given = rows[~sure], {name: given[name][~sure] for name in ("images", *names[2:])}
    return numpy.stack([answers[row] for row in range(len(images))]), [stops[row] for row in range(len(images))]


def main(arguments):
    files, paths = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    sessions = [onnxruntime.InferenceSession(file) for file in files]
    facts = sessions[0].get_modelmeta().custom_metadata_map
    channels, height, width = json.loads(facts["input_size"])
    mode = "L" if channels == 1 else "RGB"
    pixels = [numpy.asarray(Image.open(path).convert(mode).resize((width, height)), numpy.float32) for path in paths]
    images = numpy.stack([x.reshape(height, width, channels).transpose(2, 0, 1) for x in pixels]) / 255
    probabilities, stops = predict(sessions, images)
    names = json.loads(facts.get("class_names", "null")) or list(range(probabilities.shape[1]))
    for path, row, stop in zip(paths, probabilities, stops, strict=True):
        print(f"{path}: {names[row.argmax()]} ({row.max():.3f}), behind stage {stop + 1}")


if __name__ == "__main__":
    main(sys.argv[1:])
