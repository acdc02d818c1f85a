"""The built-in data sets. Imports no torch, so that commands that only list or look up data sets stay quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from certbench.data.info import VALIDATION, DatasetInfo, FileInfo
from certbench.data.names import CIFAR100_NAMES, TINYIMAGENET_NAMES
from certbench.errors import UsageError, nearest

__all__ = ["DATASETS", "DatasetInfo", "FileInfo", "dataset_info"]

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
    reader="certbench.data.formats:read_digits",
    validation_per_class=14,
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
    reader="certbench.data.formats:read_idx",
    fetcher="certbench.data.fetch:fetch_mnist",
    validation_per_class=500,
)

_FASHION_MNIST = replace(
    _MNIST,
    name="fashion-mnist",
    title="Fashion-MNIST",
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    licence="MIT; copyright Zalando SE",
    citation="H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine "
    "Learning Algorithms, arXiv 1708.07747, 2017",
    digest="",
    folders=("fashion-mnist", "FashionMNIST/raw"),
    files=(
        FileInfo("train-images-idx3-ubyte.gz", 26_421_880, md5="8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        FileInfo("train-labels-idx1-ubyte.gz", 29_515, md5="25c81989df183df01b3e8a0aad5dffbe"),
        FileInfo("t10k-images-idx3-ubyte.gz", 4_422_102, md5="bef4ecab320f06d8554ea6380940ec79"),
        FileInfo("t10k-labels-idx1-ubyte.gz", 5_148, md5="bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    by_hand="the four published .gz files",
    fetcher="certbench.data.fetch:fetch_fashion_mnist",
)
"""Kept in a folder of its own, since its files have the names of MNIST's."""

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
    reader="certbench.data.formats:read_cifar10",
    fetcher="certbench.data.fetch:fetch_cifar10",
    validation_per_class=500,
)

_CIFAR100 = replace(
    _CIFAR10,
    name="cifar100",
    title="CIFAR-100, fine labels",
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    class_names=CIFAR100_NAMES,
    digest="",
    folders=("cifar-100-python", "cifar100/cifar-100-python"),
    files=(
        FileInfo("train", 155_249_918, "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b"),
        FileInfo("test", 31_049_918, "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864"),
        FileInfo("meta", 1_473, "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9"),
    ),
    by_hand="the unpacked folder cifar-100-python",
    reader="certbench.data.formats:read_cifar100",
    fetcher="certbench.data.fetch:fetch_cifar100",
    validation_per_class=50,
)

_IMAGENET_TERMS = (
    "ImageNet's: non-commercial research and education only; the images' copyright stays with their owners"
)

_TINYIMAGENET = DatasetInfo(
    name="tinyimagenet",
    title="TinyImageNet (200 classes, 64x64)",
    classes=200,
    shape=(3, 64, 64),
    levels=255,
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2302, 0.2265, 0.2262),
    train_size=100_000,
    test_size=10_000,
    class_names=tuple(TINYIMAGENET_NAMES[wnid] for wnid in sorted(TINYIMAGENET_NAMES)),
    licence=_IMAGENET_TERMS,
    citation="Y. Le and X. Yang, Tiny ImageNet Visual Recognition Challenge, course CS231N, Stanford, 2015",
    digest="",
    crop_padding=4,
    flip=True,
    folders=("tinyimagenet", ""),
    files=(FileInfo("tiny-imagenet-200.zip", 248_100_043, md5="90528d7ca1a48142e341f4ef8d21d0de"),),
    by_hand="tiny-imagenet-200.zip",
    reader="certbench.data.tinyimagenet:read",
    fetcher="certbench.data.fetch:fetch_tinyimagenet",
    unpacked=("tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200"),
    validation_per_class=50,
)
"""The test set is the published validation set, as in the papers: the published test images have no labels."""

_FIRST_50 = sorted(list(TINYIMAGENET_NAMES)[:50])

_TINYIMAGENET_50 = replace(
    _TINYIMAGENET,
    name="tinyimagenet-50",
    title="TinyImageNet, the first 50 classes of wnids.txt only: a subset",
    classes=50,
    train_size=25_000,
    test_size=2_500,
    class_names=tuple(TINYIMAGENET_NAMES[wnid] for wnid in _FIRST_50),
    digest="6323b8f19c49eacb3df622e66943e1dcceb9c77f8ab9ff2aafc2668c1b3547f9",
    files=(
        FileInfo(
            "tinyimagenet_classes_01_20.tar.gz",
            15_466_804,
            "9dd2abd320290b9c1c0aa28ee0535b772260727106e00cda507996148c95dc9a",
        ),
        FileInfo(
            "tinyimagenet_classes_21_50.tar.gz",
            21_941_718,
            "ea4a16b431c46b3d9af399a5532b66ff6a0e2025be9c09410e783f170d942509",
        ),
        FileInfo(
            "val_annotations.txt", 347_377, "c37765a8b40fce4f28962bf1847a2537e2781753974cbb2447eeb50ff31130a2"
        ),
    ),
    by_hand="the two archives of its classes and val_annotations.txt, or the unpacked tiny-imagenet-200",
    fetcher="",
)

_IMAGENET = DatasetInfo(
    name="imagenet",
    title="ImageNet (ILSVRC 2012), 224x224",
    classes=1000,
    shape=(3, 224, 224),
    levels=255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    train_size=1_281_167,
    test_size=50_000,
    class_names=(),
    licence=_IMAGENET_TERMS,
    citation="O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, International Journal of "
    "Computer Vision 115(3), 2015",
    digest="",
    flip=True,
    folders=("imagenet", "ILSVRC2012", ""),
    by_hand="ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
    reader="certbench.data.imagenet:load",
    fetcher="certbench.data.imagenet_files:prepare",
    validation_per_class=10,
    resized_crop=(0.08, 1.0),
    streamed=True,
)
"""The test set is the published validation set, whose order is that of ImageFolder: by class, then by file name."""

_IMAGENET_256 = replace(
    _IMAGENET,
    name="imagenet-256",
    title="ImageNet, its training images scaled down once to a shorter side of 256 pixels",
    reader="certbench.data.imagenet:load_resized",
)


DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        *(_DIGITS, _MNIST, _FASHION_MNIST, _CIFAR10, _CIFAR100),
        *(_TINYIMAGENET, _TINYIMAGENET_50, _IMAGENET, _IMAGENET_256),
    )
}


def dataset_info(name: str, registered: Mapping[str, DatasetInfo] | None = None) -> DatasetInfo:
    """The entry of that name, or of ``<name>-validation``: see :meth:`DatasetInfo.held_out`.

    Args:
        registered: the data sets, with those of plugins; by default the built-in ones.

    Raises:
        UsageError: no data set has this name; the message gives the nearest one.
    """
    known = DATASETS if registered is None else registered
    if name in known:
        return known[name]
    base = name.removesuffix(VALIDATION)
    if base in known:
        return known[base].held_out()
    raise UsageError(f"unknown data set {name!r}; {nearest(name, known)}")
