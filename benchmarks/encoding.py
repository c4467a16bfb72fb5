"""Compare initializations of the canonical field on the 66-d code: python -m benchmarks.encoding [--image FRAME]

Prints a table with one row for each initialization:
    alive     share of (filter, point) pairs whose Gaussian factor exceeds 0.01; points uniform in the canonical cube
    gradient  root mean square of |d sigma / d u|, the gradient of the initial density at canonical points
    PSNR      dB, of an image fitted by a field of width 128: 300 steps of Adam (learning rate 1e-3), 4096 pixels each;
              the image is a frame of the synthetic demo, or --image
"""

import torch
from tqdm import tqdm

from common.cli import Parser
from loaders.sequence import read_image
from models.canonical_field import FALLOFF, GAMMA_SCALE, CanonicalField, initialize_for_code
from models.gabor import GaborFilter
from preprocessing.synthetic.render import render_scene

STEPS, POINTS, WIDTH = 300, 4096, 128  # optimizer steps, pixels per step, width of the field


def field(name: str, gamma_scale: float = GAMMA_SCALE, falloff: float = FALLOFF) -> CanonicalField:
    """A canonical field with the initialization `name`.

    "raw": no encoding. "omnimotion": OmniMotion's initialization. Any other name: this project's, with the given
    constants."""
    torch.manual_seed(0)
    if name == "raw":
        return CanonicalField(WIDTH, encoding="none")
    out = CanonicalField(WIDTH)
    if name == "omnimotion":
        raw = type(out.net)(66, WIDTH, 4, 3, alpha=3.0)
        out.net.load_state_dict(raw.state_dict())
    else:
        for filter_ in out.net.filters:
            initialize_for_code(filter_, 3.0 / len(out.net.filters), gamma_scale, falloff)
    return out


def envelope(filter_: GaborFilter, v: torch.Tensor) -> torch.Tensor:
    """Gaussian factor of the filters, `(M, D)` -> `(M, F)`, in [0, 1]; 0 where a filter has no effect."""
    return torch.exp(-0.5 * torch.cdist(v, filter_.mu).square() * filter_.gamma)


def alive(model: CanonicalField) -> float:
    u = torch.rand(4000, 3) * 2 - 1
    with torch.no_grad():
        shares = [(envelope(f, model.code(u)) > 0.01).float().mean() for f in model.net.filters]
        return torch.stack(shares).mean().item()


def density_gradient(model: CanonicalField) -> float:
    u = (torch.rand(4000, 3) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(u)[1].sum(), u)
    return gradient.square().sum(-1).mean().sqrt().item()


def psnr(model: CanonicalField, image: torch.Tensor) -> float:
    """PSNR in dB after fitting an image `(H, W, 3)` in [0, 1] on the plane z = 0.5 of the canonical cube."""
    H, W = image.shape[:2]
    y, x = torch.meshgrid(torch.linspace(-0.7, 0.7, H), torch.linspace(-0.7, 0.7, W), indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, 0.5)], -1).view(-1, 3)
    colors, optimizer = image.view(-1, 3), torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(points), (POINTS,))
        loss = (model(points[rows])[0] - colors[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = torch.cat([(model(p)[0] - c).square() for p, c in zip(points.split(POINTS), colors.split(POINTS),
                                                                      strict=True)])
    return -10 * error.mean().log10().item()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="picture to fit instead of the synthetic frame")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    frame = read_image(args.image) if args.image else render_scene("demo", (192, 192), 2, 0, 1)[0][0]
    image = torch.from_numpy(frame).float() / 255
    rows = [("raw coordinates, OmniMotion's initialization", "raw", {}),
            ("66-d code, OmniMotion's initialization", "omnimotion", {}),
            *((f"66-d code, gamma x{g:g}, falloff {f:g}" + (" (chosen)" if (g, f) == (GAMMA_SCALE, FALLOFF) else ""),
               "ours", {"gamma_scale": g, "falloff": f})
              for g, f in ((1.0, 0.5), (1.0, 1.0), (0.1, 0.5), (0.1, 1.0)))]
    print("| initialization | alive | gradient | PSNR |\n|---|---|---|---|")
    for title, name, constants in tqdm(rows, "fields"):
        model = field(name, **constants)
        numbers = alive(model), density_gradient(model), psnr(model, image)
        tqdm.write("| {} | {:.0%} | {:.2g} | {:.1f} |".format(title, *numbers))


if __name__ == "__main__":
    main()
