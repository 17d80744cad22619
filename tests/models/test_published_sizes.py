"""Published vision-language models trace and lower at full size, without weights."""

import pytest

from benchmarks import memory_plan as plan


def test_llava_1_5_7b():
  _, params, lowered = plan.llava_step(batch=8, length=640)
  assert plan.size(params) == plan.PUBLISHED["LLaVA-1.5-7B"]
  assert plan.lora_size(params, 32) == 79_953_920  # of the LoRASculpt spec
  loss, gradient = lowered.out_info
  assert loss.shape == ()
  assert gradient["fc_1"]["kernel"].shape == (1024, 4096)
  for device in plan.DEVICES:
    assert sum(plan.llava_memory(params, device, 8, 640).values()) < device.memory


def test_clip_vit_l_14_336():
  _, params, lowered = plan.clip_step(batch=8)
  assert plan.size(params) == plan.PUBLISHED["CLIP ViT-L/14-336"]
  loss, gradient = lowered.out_info
  assert loss.shape == ()
  assert gradient["vision"]["position"].shape == (577, 1024)


@pytest.mark.parametrize("arguments", [["--batch", "3"], ["--length", "100"]])
def test_bad_arguments_name_the_flag(arguments, capsys, monkeypatch):
  monkeypatch.setattr("sys.argv", ["memory_plan", *arguments])
  with pytest.raises(SystemExit) as stopped:
    plan.main()
  assert stopped.value.code == 2
  assert arguments[0] in capsys.readouterr().err
