"""The numbers of the SoftPool paper that this project's results are shown beside.

Stergiou, Poppe and Kalliatakis, "Refining activation downsampling with SoftPool", ICCV 2021. The
methods have the names of ``pooling_methods.METHODS``.
"""

#: The kernel sizes, which are the strides too, of Tables 1 and 3.
KERNELS = (2, 3, 5)
METRICS = ("ssim", "psnr")
#: The trainable methods of Table 1.
TRAINABLE = ("lp", "gate", "lite-s3dpp", "lip")
#: The stochastic methods of Table 1.
STOCHASTIC = ("stochastic", "s3")

#: Table 1, and for Flickr2K Table 3: SSIM and PSNR (dB) for each of :data:`KERNELS`.
SIMILARITY = {
    "DIV2K": {
        "average": (0.714, 51.247, 0.578, 44.704, 0.417, 29.223),
        "maximum": (0.685, 49.826, 0.370, 41.944, 0.358, 22.041),
        "power-average": (0.419, 35.587, 0.286, 26.329, 0.178, 16.567),
        "sum": (0.408, 35.153, 0.268, 26.172, 0.193, 17.315),
        "lp": (0.686, 49.912, 0.542, 43.083, 0.347, 25.139),
        "gate": (0.689, 50.104, 0.560, 43.437, 0.353, 25.672),
        "lite-s3dpp": (0.702, 50.598, 0.562, 44.076, 0.396, 27.421),
        "lip": (0.711, 50.831, 0.559, 44.432, 0.401, 28.285),
        "stochastic": (0.631, 45.362, 0.479, 39.895, 0.295, 21.314),
        "s3": (0.609, 44.760, 0.454, 39.326, 0.280, 20.773),
        "softpool": (0.729, 51.436, 0.594, 44.747, 0.421, 29.583),
    },
    "Urban100": {
        "average": (0.691, 50.380, 0.563, 41.745, 0.372, 28.270),
        "maximum": (0.662, 48.266, 0.528, 40.709, 0.330, 20.654),
        "power-average": (0.312, 31.911, 0.219, 24.698, 0.124, 15.659),
        "sum": (0.301, 31.657, 0.208, 24.735, 0.123, 15.243),
        "lp": (0.676, 48.508, 0.534, 39.986, 0.326, 26.365),
        "gate": (0.675, 49.769, 0.537, 40.422, 0.328, 26.731),
        "lite-s3dpp": (0.684, 49.947, 0.551, 40.813, 0.365, 27.136),
        "lip": (0.689, 50.266, 0.558, 41.159, 0.370, 27.849),
        "stochastic": (0.616, 44.342, 0.463, 37.223, 0.286, 19.358),
        "s3": (0.608, 44.239, 0.459, 36.965, 0.272, 19.645),
        "softpool": (0.694, 50.687, 0.578, 41.851, 0.394, 28.326),
    },
    "Manga109": {
        "average": (0.695, 54.326, 0.582, 43.657, 0.396, 29.862),
        "maximum": (0.671, 50.085, 0.544, 41.128, 0.324, 22.307),
        "power-average": (0.381, 29.248, 0.276, 18.874, 0.160, 9.266),
        "sum": (0.374, 30.169, 0.271, 20.150, 0.168, 13.081),
        "lp": (0.675, 51.721, 0.561, 41.824, 0.367, 27.469),
        "gate": (0.679, 51.980, 0.569, 42.127, 0.374, 27.754),
        "lite-s3dpp": (0.691, 52.646, 0.573, 42.794, 0.386, 28.598),
        "lip": (0.689, 53.537, 0.579, 43.018, 0.391, 29.331),
        "stochastic": (0.583, 46.274, 0.427, 39.259, 0.255, 22.953),
        "s3": (0.576, 46.613, 0.426, 39.866, 0.232, 23.242),
        "softpool": (0.704, 54.563, 0.586, 43.782, 0.403, 30.114),
    },
    "Flickr2K": {
        "average": (0.709, 51.786, 0.572, 44.246, 0.408, 28.957),
        "maximum": (0.674, 47.613, 0.385, 40.735, 0.329, 21.368),
        "power-average": (0.392, 34.319, 0.271, 26.820, 0.163, 15.453),
        "sum": (0.386, 34.173, 0.265, 26.259, 0.161, 15.218),
        "lp": (0.683, 48.617, 0.437, 42.079, 0.341, 24.432),
        "gate": (0.687, 49.314, 0.449, 42.722, 0.358, 25.687),
        "lite-s3dpp": (0.691, 50.586, 0.534, 43.608, 0.385, 27.430),
        "lip": (0.696, 50.947, 0.548, 43.882, 0.390, 28.134),
        "stochastic": (0.625, 46.714, 0.474, 38.365, 0.264, 21.428),
        "s3": (0.611, 46.547, 0.476, 37.706, 0.252, 21.363),
        "softpool": (0.721, 52.356, 0.587, 44.893, 0.416, 29.341),
    },
}


def similarity(dataset: str, method: str, kernel: int, metric: str) -> float | None:
    """Returns a number of :data:`SIMILARITY`, or None for a kernel that the paper does not have."""
    if kernel not in KERNELS:
        return None
    return SIMILARITY[dataset][method][2 * KERNELS.index(kernel) + METRICS.index(metric)]
