"""What every data set is: shapes, normalisation, augmentation, terms, and the files it is made of.

Imports no torch, so that commands that only list or look up data sets stay quick.
"""

from __future__ import annotations

from dataclasses import dataclass

from certbench.errors import UsageError, nearest


@dataclass(frozen=True)
class FileInfo:
    """One file's *unpacked* content: name, size in bytes and SHA-256. A ``.gz`` of it is as good as the file."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    ``shape`` is (channels, height, width); a pixel in [0, 1] is its stored integer divided by ``levels``. ``mean``
    and ``std``, per channel and in raw pixel units, are the normalisation inside the network. Augmentation, in this
    order: a random horizontal flip where ``flip``, then a random crop back to ``shape`` after repeating the edge
    ``crop_padding`` pixels outwards on each side.

    ``folders`` are the places under the data folder where the files may lie, the first being where ``fetch`` puts
    them; ``by_hand`` says which published files to put there where there is no network. ``digest`` is the
    :func:`certbench.data.dataset.dataset_digest` that the loaded data must have.
    """

    name: str
    title: str
    classes: int
    shape: tuple[int, int, int]
    levels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    class_names: tuple[str, ...]
    licence: str
    citation: str
    digest: str
    crop_padding: int = 0
    flip: bool = False
    folders: tuple[str, ...] = ()
    files: tuple[FileInfo, ...] = ()
    by_hand: str = ""


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))

_DIGITS = DatasetInfo(
    name="digits",
    title="scikit-learn digits (8x8)",
    classes=10,
    shape=(1, 8, 8),
    levels=16,
    mean=(0.0,),
    std=(1.0,),
    train_size=1437,
    test_size=360,
    class_names=_DIGIT_NAMES,
    licence="CC BY 4.0 (UCI Machine Learning Repository); a copy comes with scikit-learn",
    citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, 1998",
    digest="7bf2eb84fd68a763b149e94dc5c7f98391e64974c7e9d7e4b99c3a292e942a0a",
)

_MNIST = DatasetInfo(
    name="mnist",
    title="MNIST",
    classes=10,
    shape=(1, 28, 28),
    levels=255,
    mean=(0.0,),
    std=(1.0,),
    train_size=60_000,
    test_size=10_000,
    class_names=_DIGIT_NAMES,
    licence="none stated by the authors; copyright Y. LeCun and C. Cortes, commonly given as CC BY-SA 3.0",
    citation="Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document "
    "recognition, Proceedings of the IEEE 86(11), 1998",
    digest="432cdec99f580d5ff527d4f43f2645db5b906e47926529e35bd0b992f7f37058",
    folders=("mnist", "", "MNIST/raw"),
    files=(
        FileInfo(
            "train-images-idx3-ubyte",
            47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        FileInfo(
            "train-labels-idx1-ubyte",
            60_008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        FileInfo(
            "t10k-images-idx3-ubyte",
            7_840_016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        FileInfo(
            "t10k-labels-idx1-ubyte",
            10_008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    by_hand="the four IDX files (unpacked or .gz)",
)

_CIFAR10 = DatasetInfo(
    name="cifar10",
    title="CIFAR-10",
    classes=10,
    shape=(3, 32, 32),
    levels=255,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    train_size=50_000,
    test_size=10_000,
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    licence="none stated; the authors ask that their report be cited",
    citation="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, University "
    "of Toronto, 2009",
    digest="67ffe0a05b106dee184723af70ddcb604ef611218272f778710f4ec0782524d6",
    crop_padding=2,
    flip=True,
    folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
    files=(
        FileInfo(
            "data_batch_1", 31_035_704, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"
        ),
        FileInfo(
            "data_batch_2", 31_035_320, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"
        ),
        FileInfo(
            "data_batch_3", 31_035_999, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"
        ),
        FileInfo(
            "data_batch_4", 31_035_696, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"
        ),
        FileInfo(
            "data_batch_5", 31_035_623, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"
        ),
        FileInfo(
            "test_batch", 31_035_526, "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"
        ),
        FileInfo("batches.meta", 158, "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb"),
    ),
    by_hand="the unpacked folder cifar-10-batches-py",
)

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in (_DIGITS, _MNIST, _CIFAR10)}


def dataset_info(name: str) -> DatasetInfo:
    """The catalogue's entry.

    Raises:
        UsageError: no data set has this name; the message gives the nearest one.
    """
    try:
        return DATASETS[name]
    except KeyError:
        raise UsageError(f"unknown data set {name!r}; {nearest(name, DATASETS)}") from None
