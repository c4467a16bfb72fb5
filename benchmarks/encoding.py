"""Compare initializations of the canonical field on the 66-d code: python -m benchmarks.encoding [--image FRAME]

Prints a table with one row for each initialization. docs/encoding.md explains the columns. PSNR is that of an image
fitted with Adam at learning rate 1e-3; the image is a frame of the synthetic demo, or --image.
"""

from functools import partial
from itertools import product

import torch
from tqdm import tqdm

from common.cli import Parser
from evaluation.tables import markdown
from loaders.sequence import read_image
from models.canonical_field import FALLOFF, GAMMA_SCALE, CanonicalField, initialize_for_code
from models.gabor import GaborFilter
from preprocessing.synthetic.render import render_scene

STEPS = 300  # optimizer steps of the fit
PIXELS = 4096  # pixels per step of the fit
WIDTH = 128  # units of the field's layers
POINTS = 4000  # random points of the canonical cube


def omnimotion_field() -> CanonicalField:
    """A field on the 66-d code with OmniMotion's initialization, which is for raw coordinates."""
    out = CanonicalField(WIDTH)
    raw = type(out.net)(66, WIDTH, 4, 3, alpha=3.0)
    out.net.load_state_dict(raw.state_dict())
    return out


def code_field(gamma_scale: float, falloff: float) -> CanonicalField:
    """A field on the 66-d code with this project's initialization."""
    out = CanonicalField(WIDTH)
    for filter_ in out.net.filters:
        initialize_for_code(filter_, 3.0 / len(out.net.filters), gamma_scale, falloff)
    return out


def envelope(filter_: GaborFilter, v: torch.Tensor) -> torch.Tensor:
    """Gaussian factor of the filters, `(M, D)` -> `(M, F)`, in [0, 1]; 0 where a filter has no effect."""
    return torch.exp(-0.5 * torch.cdist(v, filter_.mu).square() * filter_.gamma)


def alive(model: CanonicalField) -> float:
    """Share of (filter, point) pairs whose Gaussian factor exceeds 0.01."""
    u = torch.rand(POINTS, 3) * 2 - 1
    with torch.no_grad():
        shares = [(envelope(f, model.code(u)) > 0.01).float().mean() for f in model.net.filters]
        return torch.stack(shares).mean().item()


def density_gradient(model: CanonicalField) -> float:
    """Root mean square of the gradient of the density at canonical points."""
    u = (torch.rand(POINTS, 3) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(u)[1].sum(), u)
    return gradient.square().sum(-1).mean().sqrt().item()


def psnr(model: CanonicalField, image: torch.Tensor) -> float:
    """PSNR in dB after fitting an image `(H, W, 3)` in [0, 1] on the plane z = 0.5 of the canonical cube."""
    H, W = image.shape[:2]
    y, x = torch.meshgrid(torch.linspace(-0.7, 0.7, H), torch.linspace(-0.7, 0.7, W), indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, 0.5)], -1).view(-1, 3)
    colors = image.view(-1, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(points), (PIXELS,))
        loss = (model(points[rows])[0] - colors[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = torch.cat([(model(p)[0] - c).square() for p, c in zip(points.split(PIXELS), colors.split(PIXELS),
                                                                      strict=True)])
    return -10 * error.mean().log10().item()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="picture to fit instead of the synthetic frame")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    frame = read_image(args.image) if args.image else render_scene("demo", (192, 192), 2, 0, 1)[0][0]
    image = torch.from_numpy(frame).float() / 255
    fields = {"raw coordinates, OmniMotion": partial(CanonicalField, WIDTH, encoding="none"),
              "66-d code, OmniMotion": omnimotion_field}
    for constants in product((1.0, 0.1), (0.5, 1.0)):
        title = "66-d code, gamma x{:g}, falloff {:g}".format(*constants)
        if constants == (GAMMA_SCALE, FALLOFF):
            title += " (chosen)"
        fields[title] = partial(code_field, *constants)
    rows = []
    for title, new_field in tqdm(fields.items(), "fields"):
        torch.manual_seed(0)
        model = new_field()
        rows.append([title, f"{alive(model):.0%}", f"{density_gradient(model):.2g}", f"{psnr(model, image):.1f}"])
    print(markdown(["initialization", "alive", "gradient", "PSNR"], rows))


if __name__ == "__main__":
    main()
