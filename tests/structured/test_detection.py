"Parts, penalties, teachers and the meter of detections: golden numbers, invariants, refusals."
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.recovery import finetune
from pruning_bench.structured.detection import ap50, attention_map_loss, part_wise, channel_kl_loss, distil, box_iou
from pruning_bench.structured.sparse_training import bn_scales


def conv(i, o, s=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Net(nn.Module):
    "A backbone, a neck with a concatenation of two scales and a split, and a head."
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"a": conv(1, 8), "b": conv(8, 12, 2)})
        self.neck = nn.ModuleDict({"mix": conv(20, 16), "out": conv(24, 8)})
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        a = self.backbone.a(x)
        b = self.backbone.b(a)
        left, right = self.neck.mix(torch.cat([F.interpolate(b, scale_factor=2), a], 1)).chunk(2, 1)
        return self.head(self.neck.out(torch.cat([left, right, left * right], 1)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(n=4):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 1, 8, 8, generator=g), torch.rand(4, 6, 8, 8, generator=g)) for _ in range(n)]


def parts(plan):
    out = {}
    for n, m in plan.masks.items():
        kept, size = out.get(n.partition(".")[0], (0, 0))
        out[n.partition(".")[0]] = kept + int(m.sum()), size + len(m)
    return out


# the meter

def found(*rows):
    boxes, scores, kinds = zip(*rows) if rows else ((), (), ())
    return ((torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(scores),
             torch.tensor(kinds, dtype=torch.long)))


A, B, WRONG = (0, 0, 10, 10), (20, 20, 30, 30), (12, 0, 22, 10)
TRUTH = [torch.tensor([[1., *A], [1., *B]])]


@pytest.mark.parametrize("rows, area", [
    ([(A, .9, 1), (B, .8, 1)], 1.),
    ([], 0.),
    ([(A, .9, 2), (B, .8, 2)], 0.),
    ([(WRONG, .9, 1), (A, .8, 1)], .25),                    # precision 1/2 at recall 1/2
    ([(A, .9, 1), (WRONG, .8, 1), (B, .7, 1)], .5 + 1 / 3), # 1/2 * 1 + 1/2 * 2/3
    ([(A, .9, 1), (A, .8, 1)], .5),                         # found twice: the second is an alarm
    ([(WRONG, .9, 1), (A, .8, 1), (B, .7, 1)], 2 / 3),      # precision is made falling: 2/3 throughout
    ([((0, 0, 10, 20), .9, 1)], .5),                        # overlap of exactly one half counts
    ([((0, 0, 10, 20.1), .9, 1)], 0.)])
def test_average_precision_by_hand(rows, area):
    assert ap50([found(*rows)], TRUTH) == pytest.approx(area)


def test_pictures_and_classes_are_kept_apart():
    truth = [torch.tensor([[1., *A]]), torch.tensor([[2., *A]]), torch.zeros(0, 5)]
    assert ap50([found((A, .9, 1)), found((A, .8, 2)), found()], truth) == 1
    assert ap50([found((A, .9, 2)), found((A, .8, 1)), found()], truth) == 0
    assert ap50([found((A, .9, 1)), found((A, .8, 2)), found((A, .95, 2))], truth) == pytest.approx(.75)


def test_overlap_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 4, generator=g).sort(1).values[:, [0, 1, 2, 3]] for _ in range(2))
    assert torch.allclose(box_iou(a, b), torchvision.ops.box_iou(a, b), atol=1e-6)


# parts

SCALES = {"x.a": torch.tensor([9., 8, 7, 6]), "y.a": torch.tensor([5., 1]), "y.b": torch.tensor([4., 3, 2, 0])}
EVEN = SimpleNamespace(cost=lambda n: 1.)


def test_every_part_has_its_own_ranking():
    assert part_wise()(SCALES, .5, EVEN) == {"x.a": .5, "y.a": .5, "y.b": .5}
    lost = part_wise({"x*": 1., "y*": 2.})(SCALES, .5, EVEN)   # of ten units five go: 4 p + 6 * 2 p = 5
    assert round(4 * (1 - lost["x.a"])) == 1 and round(2 * (1 - lost["y.a"])) + round(4 * (1 - lost["y.b"])) == 4


def test_a_name_without_a_part_is_refused():
    with pytest.raises(BadInput, match="x.a"):
        part_wise({"y*": 1.})(SCALES, .5, EVEN)


def test_parts_lose_equally_whatever_their_scales():
    model = net()
    with torch.no_grad():
        for m in model.neck.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.mul_(20)
    plan = prune(model, "gcp-yolov4", .5, data=batches(), loss=F.mse_loss, steps=4)
    assert all(abs(kept / size - .5) < .1 for kept, size in parts(plan).values())
    assert model(batches()[0][0]).shape == (4, 6, 8, 8)


def test_half_of_every_layer():
    plan = prune(net(), "yolov8-cwd", .5, data=batches(), loss=F.mse_loss, steps=4)
    assert all(2 * int(m.sum()) == len(m) for m in plan.masks.values())


@pytest.mark.parametrize("name", ["gcp-yolov4", "yolov8-cwd"])
def test_the_penalty_travels_as_far_as_it_says(name):
    "Without a gradient, a scale moves by `travel` before the choice (the strongest by less, where they are let go)."
    seen = []
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.part, self.out = conv(1, 20), nn.Conv2d(20, 2, 1)
        def forward(self, x):
            if self.training: seen.append(self.part[1].weight.detach().clone())
            return self.out(self.part(x)) * 0
    model = Spy()
    with torch.no_grad(): model.part[1].weight.copy_(torch.linspace(1, 2, 20))
    prune(model, name, .5, data=[(torch.rand(4, 1, 4, 4), torch.zeros(4, 2, 4, 4))] * 2, loss=F.mse_loss,
          total_shrinkage=.4, prune_at=.5, recover=finetune(41, 1e-12))
    moved = torch.linspace(1, 2, 20) - seen[20]
    assert torch.allclose(moved[:10], torch.full((10,), .4 * 20 / 20.5), rtol=.08)
    if name == "gcp-yolov4": assert (moved[-5:] < .85 * moved[0]).all()


def test_no_batch_norm_is_refused():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(BadInput, match="no batch norm"):
        prune(plain, "gcp-yolov4", .5, data=batches(), loss=F.mse_loss, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), plain.state_dict().values())) and bn_scales


# teachers

def test_channel_gap_by_hand_and_its_blindness():
    t, s = torch.tensor([[[[0., 0.]]]]), torch.tensor([[[[0., torch.log(torch.tensor(3.)).item()]]]])
    kl = .5 * torch.log(torch.tensor(.5 / .25)) + .5 * torch.log(torch.tensor(.5 / .75))
    assert torch.allclose(channel_kl_loss(s, t), kl)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.allclose(channel_kl_loss(a + torch.randn(2, 3, 1, 1), b + 7), channel_kl_loss(a, b), atol=1e-5)
    assert channel_kl_loss(a, a) == 0
    assert channel_kl_loss(a, b) > 0
    assert torch.allclose(channel_kl_loss(2 * a, 2 * b, 2.), 4 * channel_kl_loss(a, b), atol=1e-4)


def test_attention_ignores_scale_and_width():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    assert torch.allclose(attention_map_loss(3 * a, b), attention_map_loss(a, b), atol=1e-7)
    assert attention_map_loss(a, b) > 0
    one = torch.tensor([[[[3., 0.]]]]), torch.tensor([[[[0., 2.]]]])
    assert torch.allclose(attention_map_loss(*one), torch.tensor(1.))   # maps (1, 0) and (0, 1)


@pytest.mark.parametrize("gap", [channel_kl_loss, attention_map_loss])
def test_a_teacher_pulls_the_features_and_leaves_no_trace(gap):
    teacher = net()
    def distance(model):
        seen = {}
        hooks = [m.neck.out.register_forward_hook(lambda mod, args, out, k=k: seen.__setitem__(k, out))
                 for k, m in (("s", model.eval()), ("t", teacher.eval()))]
        with torch.no_grad(): [m(batches()[0][0]) for m in (model, teacher)]
        for h in hooks: h.remove()
        return attention_map_loss(seen["s"], seen["t"]).item()
    got = {}
    for weight in (0., 100.):
        model = net(seed=1)
        distil(teacher, ["neck.out"], gap, weight, finetune(30, 1e-2))(model, batches(), F.mse_loss)
        got[weight] = distance(model)
        assert not hasattr(model, "channel_projections")
        assert model.state_dict().keys() == teacher.state_dict().keys()
        assert not model.neck.out._forward_hooks
    assert got[100.] < got[0.] and not teacher.neck.out._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), net().state_dict().values()))


def test_a_narrow_student_is_translated():
    teacher, student = net(), net()
    plan = prune(student, "l1-filter", .5, data=batches(), loss=F.mse_loss,
                 recover=distil(teacher, ["backbone.b", "neck.out"], recovery=finetune(2, 1e-3)))
    assert plan.density == pytest.approx(.5, abs=.01) and not hasattr(student, "channel_projections")
    assert student.backbone.b[0].out_channels == 6


def test_an_unknown_layer_is_named_and_nothing_hangs_on():
    model = net()
    with pytest.raises(BadInput, match="neck.ouch"):
        distil(net(), ["neck.ouch"])(model, batches(), F.mse_loss)
    assert not any(m._forward_hooks for m in model.modules())
