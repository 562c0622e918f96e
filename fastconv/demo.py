"""`fastconv demo`: train a small convolutional network on real images with fastconv and NumPy alone.

The page reads from top to bottom: the data, the network and its two passes by hand, the training loop, the check of
the gradients, and then what the command shows. Every layer is a convolution (Springenberg et al., 2015, "Striving for
simplicity: the all convolutional net"): a stride takes the place of pooling, and the last layer has one channel per
class, whose mean over all positions is the logit of the class (Lin et al., 2014, "Network in network").
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastconv as fc

# ---------------------------------------------------------------------------------------------------------------------
# The images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Dataset:
    """Images (N, C, H, W) in float32 and their labels (N,), to learn from and to be judged on."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    names: Sequence[str]


def load_digits(rng: np.random.Generator) -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn ships, one fifth of them kept for the test."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = (digits.images[:, None] / 16).astype(np.float32)  # pixels are 0 to 16
    labels = digits.target.astype(np.int64)
    order = rng.permutation(len(images))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset(images[train], labels[train], images[test], labels[test], [str(name) for name in range(10)])


def load_photos(rng: np.random.Generator, train_size: int = 128, test_size: int = 64, size: int = 224) -> Dataset:
    """Crops of 3 x 224 x 224 from the two photographs that scikit-learn ships: which photograph is a crop from?

    Training crops come from the left half of each photograph and test crops from the right half, so no test pixel was
    ever trained on.
    """
    from sklearn.datasets import load_sample_images

    photos = [np.moveaxis(photo, -1, 0) for photo in load_sample_images().images]

    def crops(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % len(photos)
        images = np.empty((count, 3, size, size), np.float32)
        for image, label in zip(images, labels, strict=True):
            half = np.array_split(photos[label], 2, axis=2)[side]
            top = rng.integers(half.shape[1] - size + 1)
            left = rng.integers(half.shape[2] - size + 1)
            image[:] = half[:, top : top + size, left : left + size]
        return images / 127.5 - 1, labels  # bytes to -1 ... 1

    return Dataset(*crops(train_size, side=0), *crops(test_size, side=1), names=["temple", "flower"])


# ---------------------------------------------------------------------------------------------------------------------
# The network: forward and backward by hand
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A convolution with its bias, followed by max(0, .) where `activation` is "relu"."""

    weight: np.ndarray  # (O, C, K, K)
    bias: np.ndarray  # (O,)
    stride: int
    padding: int
    activation: str | None

    def astype(self, dtype: type) -> Layer:
        return Layer(self.weight.astype(dtype), self.bias.astype(dtype), self.stride, self.padding, self.activation)


def make_layer(
    rng: np.random.Generator, channels: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, *,
    activation: str | None = "relu",
) -> Layer:  # fmt: skip
    """Random weights of variance 2/fan_in keep the size of activations from layer to layer (He et al., 2015)."""
    fan_in = channels * kernel * kernel
    weight = rng.normal(0, math.sqrt(2 / fan_in), (outputs, channels, kernel, kernel))
    return Layer(weight.astype(np.float32), np.zeros(outputs, np.float32), stride, padding, activation)


def digits_network(rng: np.random.Generator) -> list[Layer]:
    return [
        make_layer(rng, 1, 16, kernel=3, padding=1),  #             1 x 8 x 8  ->  16 x 8 x 8
        make_layer(rng, 16, 32, kernel=3, stride=2, padding=1),  #             ->  32 x 4 x 4
        make_layer(rng, 32, 32, kernel=3, padding=1),  #                       ->  32 x 4 x 4
        make_layer(rng, 32, 10, kernel=4, activation=None),  #                 ->  10 x 1 x 1
    ]


def photos_network(rng: np.random.Generator) -> list[Layer]:
    return [
        make_layer(rng, 3, 8, kernel=7, stride=4, padding=3),  #    3 x 224 x 224  ->   8 x 56 x 56
        make_layer(rng, 8, 16, kernel=5, stride=4, padding=2),  #                  ->  16 x 14 x 14
        make_layer(rng, 16, 32, kernel=3, stride=2, padding=1),  #                 ->  32 x 7 x 7
        make_layer(rng, 32, 2, kernel=1, activation=None),  #                      ->   2 x 7 x 7
    ]


@dataclass
class Stopwatch:
    """Calls a function and keeps how long it took, per function: ``timed(fc.conv2d, x, w)``."""

    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        self.seconds[function.__name__] += time.perf_counter() - start  # type: ignore[assignment]
        self.calls[function.__name__] += 1
        return result


def forward(layers: Sequence[Layer], images: np.ndarray, timed: Stopwatch) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits (N, classes), and for `backward` the images followed by the output of every layer."""
    activations = [images]
    for layer in layers:
        x = activations[-1]
        y = timed(fc.conv2d, x, layer.weight, layer.bias, layer.stride, layer.padding, activation=layer.activation)
        activations.append(y)
    return activations[-1].mean(axis=(2, 3)), activations


def backward(
    layers: Sequence[Layer], activations: Sequence[np.ndarray], logits_grad: np.ndarray, timed: Stopwatch
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return dLoss/d(weight, bias) of every layer, from dLoss/dlogits and the activations that `forward` returned.

    This is the chain rule, layer by layer from the last to the first. (`fc.conv2d_backward` gives the three gradients
    of a layer in one call; here they are apart so that each can be timed.)
    """
    _, _, height, width = activations[-1].shape
    grad = np.broadcast_to(logits_grad[:, :, None, None] / (height * width), activations[-1].shape)  # of the mean
    grads = []
    for index in reversed(range(len(layers))):
        layer, x, y = layers[index], activations[index], activations[index + 1]
        if layer.activation == "relu":
            grad = grad * (y > 0)  # relu passes the gradient on where it passed the value on
        weight_grad = timed(fc.conv2d_weight_grad, x, layer.weight.shape, grad, layer.stride, layer.padding)
        bias_grad = timed(fc.conv_bias_grad, grad)
        grads.append((weight_grad, bias_grad))
        if index > 0:  # nobody asks for the gradient of the images themselves
            grad = timed(fc.conv2d_input_grad, x.shape, layer.weight, grad, layer.stride, layer.padding)
    return grads[::-1]


# The target is 0.9 of the true class and 0.1 spread over all classes (Szegedy et al., 2016): on the digits this leaves
# fewer test errors than the bare labels do.
LABEL_SMOOTHING = 0.1


def loss_and_grads(
    layers: Sequence[Layer], images: np.ndarray, labels: np.ndarray, timed: Stopwatch
) -> tuple[float, list[tuple[np.ndarray, np.ndarray]]]:
    """The mean softmax cross-entropy over the images, and its gradient for every weight and bias."""
    logits, activations = forward(layers, images, timed)
    loss, logits_grad = timed(fc.softmax_cross_entropy_with_grad, logits, labels, label_smoothing=LABEL_SMOOTHING)
    return float(loss), backward(layers, activations, logits_grad, timed)


def predict(layers: Sequence[Layer], images: np.ndarray, timed: Stopwatch, batch: int = 64) -> np.ndarray:
    """Return the probability of every class for every image: (N, classes)."""
    logits = [forward(layers, images[start : start + batch], timed)[0] for start in range(0, len(images), batch)]
    return timed(fc.softmax, np.concatenate(logits))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(
    layers: Sequence[Layer], data: Dataset, epochs: int, batch: int, learning_rate: float, rng: np.random.Generator,
    timed: Stopwatch, momentum: float = 0.9,
) -> Iterator[float]:  # fmt: skip
    """Change `layers` in place by stochastic gradient descent with momentum; yield the loss of every step.

    The learning rate falls linearly to zero. The last images of an epoch that do not fill a batch wait for the next
    shuffle.
    """
    velocities = [(np.zeros_like(layer.weight), np.zeros_like(layer.bias)) for layer in layers]
    steps = epochs * steps_per_epoch(data, batch)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(data.train_images))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss, grads = loss_and_grads(layers, data.train_images[chosen], data.train_labels[chosen], timed)
            rate = learning_rate * (1 - step / steps)
            for layer, velocity, grad in zip(layers, velocities, grads, strict=True):
                for parameter, v, g in zip((layer.weight, layer.bias), velocity, grad, strict=True):
                    v *= momentum
                    v -= rate * g
                    parameter += v
            step += 1
            yield loss


def steps_per_epoch(data: Dataset, batch: int) -> int:
    return len(data.train_images) // batch


def gradient_check(
    layers: Sequence[Layer], images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, probes: int = 10
) -> dict[str, float]:
    """Compare the gradients with central differences, (loss(w + h) - loss(w - h)) / 2h, in float64.

    Returns, for the weight and the bias of every layer, the largest difference over `probes` random elements,
    relative to the largest gradient among them.
    """
    untimed = Stopwatch()
    layers = [layer.astype(np.float64) for layer in layers]
    for layer in layers:  # blank pixels and a bias of zero meet relu at its corner, where it has no derivative
        layer.bias += rng.normal(0, 0.1, layer.bias.shape)
    images = images.astype(np.float64)

    def loss_and_signs() -> tuple[float, np.ndarray]:
        logits, activations = forward(layers, images, untimed)
        loss = fc.softmax_cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        return float(loss), np.concatenate([y.ravel() > 0 for y in activations])

    def central_difference(parameter: np.ndarray, element: int) -> float:
        kept = parameter[element]
        for step in (1e-5, 1e-6, 1e-7, 1e-8):
            parameter[element] = kept + step
            above, signs_above = loss_and_signs()
            parameter[element] = kept - step
            below, signs_below = loss_and_signs()
            parameter[element] = kept
            if np.array_equal(signs_above, signs_below):
                break  # no relu turned its corner on the way, so the loss is smooth between the two points
        return (above - below) / (2 * step)

    _, grads = loss_and_grads(layers, images, labels, untimed)
    errors = {}
    for index, (layer, layer_grads) in enumerate(zip(layers, grads, strict=True), start=1):
        for name, grad in zip(("weight", "bias"), layer_grads, strict=True):
            parameter = getattr(layer, name).reshape(-1)  # a view: to change an element is to change the layer
            chosen = rng.choice(parameter.size, min(probes, parameter.size), replace=False)
            differences = np.array([central_difference(parameter, element) for element in chosen])
            expected = grad.reshape(-1)[chosen]
            errors[f"layer {index} {name}"] = float(np.abs(expected - differences).max() / np.abs(expected).max())
    return errors


# A float64 loss near 1 brings eps/step of rounding into a central difference: 2e-11 for the first step, 2e-8 for the
# last, relative to gradients of 0.01 and more. A wrong gradient is off by a good part of itself.
GRADIENT_TOLERANCE = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What `--images` chooses: the images, the network, and settings that train it well."""

    load: Callable[[np.random.Generator], Dataset]
    network: Callable[[np.random.Generator], list[Layer]]
    epochs: int
    batch: int
    learning_rate: float
    title: str


TASKS = {
    "digits": Task(load_digits, digits_network, 15, 32, 0.05, "handwritten digits, 1 x 8 x 8, ten classes"),
    "photos": Task(load_photos, photos_network, 8, 16, 0.01, "crops of two photographs, 3 x 224 x 224, two classes"),
}


@dataclass
class Result:
    """What a run of the demo found."""

    accuracy: float
    losses: list[float]
    accuracies: list[float]
    gradient_errors: dict[str, float]
    timed: Stopwatch
    compile_seconds: float
    train_seconds: float
    picture: Path

    @property
    def gradients_agree(self) -> bool:
        return all(error <= GRADIENT_TOLERANCE for error in self.gradient_errors.values())


def run(
    images: str, picture: Path, *, backend: str = "cpu", seed: int = 0, epochs: int | None = None
) -> Result:
    """Run the demo on `images` ("digits" or "photos"): check the gradients, train, print the times, draw `picture`."""
    from rich.console import Console

    console = Console(highlight=False)
    task = TASKS[images]
    epochs = task.epochs if epochs is None else epochs
    with fc.use_backend(backend):
        rng = np.random.default_rng(seed)
        data = task.load(rng)
        layers = task.network(rng)
        sizes = f"{len(data.train_images)} to train on, {len(data.test_images)} to test"
        console.print(f"[bold]{task.title}[/]: {sizes}", soft_wrap=True)

        start = time.perf_counter()
        with console.status("Compiling the kernels (the first run only; then they come from the cache)"):
            first = data.train_images[: task.batch], data.train_labels[: task.batch]
            loss_and_grads(layers, *first, Stopwatch())
            # The check also compiles the float64 kernels; it wants gradients of a healthy size, hence new weights.
            gradient_errors = gradient_check(layers, data.train_images[:4], data.train_labels[:4], rng)
        compile_seconds = time.perf_counter() - start

        start = time.perf_counter()
        timed = Stopwatch()
        losses, accuracies = _train_and_show(layers, data, task, epochs, rng, timed, console)
        train_seconds = time.perf_counter() - start
        probabilities = predict(layers, data.test_images, timed)

    result = Result(
        accuracy(probabilities, data.test_labels), losses, accuracies, gradient_errors, timed, compile_seconds,
        train_seconds, picture,
    )  # fmt: skip
    draw_picture(result, layers, data, probabilities)
    _report(result, console)
    return result


def _train_and_show(
    layers: list[Layer], data: Dataset, task: Task, epochs: int, rng: np.random.Generator, timed: Stopwatch,
    console: Any,
) -> tuple[list[float], list[float]]:  # fmt: skip
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"),
    )  # fmt: skip
    per_epoch = steps_per_epoch(data, task.batch)
    losses: list[float] = []
    accuracies = [accuracy(predict(layers, data.test_images, timed), data.test_labels)]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=epochs * per_epoch, loss=math.nan, accuracy=accuracies[0])
        for loss in train(layers, data, epochs, task.batch, task.learning_rate, rng, timed):
            losses.append(loss)
            progress.update(bar, advance=1, loss=loss)
            if len(losses) % per_epoch == 0:
                accuracies.append(accuracy(predict(layers, data.test_images, timed), data.test_labels))
                progress.update(bar, accuracy=accuracies[-1])
                progress.console.print(
                    f"epoch {len(losses) // per_epoch:2}: loss {np.mean(losses[-per_epoch:]):.4f}, "
                    f"test accuracy {accuracies[-1]:.1%}"
                )
    return losses, accuracies


def _report(result: Result, console: Any) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    kernels = Table("time per kernel", box=SIMPLE)
    for title in ("calls", "ms/call", "seconds", "share"):
        kernels.add_column(title, justify="right")
    for name, seconds in result.timed.seconds.most_common():
        calls = result.timed.calls[name]
        share = seconds / result.train_seconds
        kernels.add_row(name, str(calls), f"{1e3 * seconds / calls:.3f}", f"{seconds:.2f}", f"{share:.0%}")
    console.print(kernels)

    check = Table("gradient", box=SIMPLE)
    check.add_column("relative difference from finite differences (float64)", justify="right")
    for name, error in result.gradient_errors.items():
        check.add_row(name, f"{error:.1e}")
    console.print(check)
    verdict = "agree" if result.gradients_agree else "[bold red]DISAGREE[/]"
    console.print(f"gradients {verdict} (tolerance {GRADIENT_TOLERANCE:.0e})")
    console.print(f"compilation and gradient check took {result.compile_seconds:.1f} s,", end=" ")
    console.print(f"training {result.train_seconds:.1f} s")
    console.print(f"[bold]test accuracy {result.accuracy:.2%}[/], picture in {result.picture}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def check_picture_file(path: Path) -> None:
    """Raise ValueError where a picture could not be written, so that a user hears of it before the training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.filetypes
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{path} is no picture matplotlib can write (expected a name in .{', .'.join(sorted(known))})")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist")


def draw_picture(result: Result, layers: Sequence[Layer], data: Dataset, probabilities: np.ndarray) -> None:
    """Write the training curve, the filters of the first layer and predictions for test images to `result.picture`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.1), squeeze=False).ravel()
    curve, filters = upper.subfigures(1, 2, width_ratios=(1.4, 1), squeeze=False).ravel()

    axes = curve.subplots()
    axes.plot(np.arange(1, len(result.losses) + 1), result.losses, color="tab:blue", linewidth=0.8)
    axes.set(title="training", xlabel="step", ylabel="loss (softmax cross-entropy)", yscale="log")
    right = axes.twinx()
    epochs = np.linspace(0, len(result.losses), len(result.accuracies))
    right.plot(epochs, result.accuracies, color="tab:orange", marker="o", markersize=3)
    right.set(ylabel=f"test accuracy (at the end {result.accuracy:.1%})", ylim=(0, 1.02))
    right.yaxis.label.set_color("tab:orange")
    axes.yaxis.label.set_color("tab:blue")

    filters.suptitle("filters of the first layer")
    _tiles(filters, layers[0].weight)

    lower.suptitle("test images: predicted class and its probability, red where wrong")
    wrong_first = np.argsort(probabilities[np.arange(len(probabilities)), data.test_labels], kind="stable")
    shown = np.concatenate([wrong_first[:4], np.linspace(0, len(probabilities) - 1, 12).astype(int)])
    guesses = probabilities[shown].argmax(axis=1)
    titles = [
        f"{data.names[guess]} ({probabilities[index, guess]:.0%})"
        for index, guess in zip(shown, guesses, strict=True)
    ]  # fmt: skip
    colors = ["black" if right else "red" for right in guesses == data.test_labels[shown]]
    _tiles(lower, data.test_images[shown], titles, colors, columns=8)
    figure.savefig(result.picture)


def _tiles(
    figure: Any, images: np.ndarray, titles: Sequence[str] = (), colors: Sequence[str] = (), columns: int = 4
) -> None:  # fmt: skip
    """Draw `images`, (N, C, H, W) with C 1 or 3, in rows of `columns`, each scaled to its own range."""
    grid = figure.subplots(-(-len(images) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for index, (axes, image) in enumerate(zip(grid, images, strict=False)):
        low, high = image.min(), image.max()
        axes.imshow(np.moveaxis((image - low) / (high - low), 0, -1), cmap="gray", vmin=0, vmax=1)
        if titles:
            axes.set_title(titles[index], color=colors[index], fontsize=9)
