"""The folders that each kind of source is read from, as agvas-train --help prints them.

Text alone, so that help loads no reader; where the readers were learned from, and what they leave out, stands in their files. A test holds
that every kind is here, with the files that its reader looks for.
"""

from __future__ import annotations

__all__ = ["LAYOUTS_HELP"]

LAYOUTS_HELP = """\
sources of --mixture by group and kind, as published (ROOT is the source's "root"; in brackets what its other options change):
 general
  coco          ROOT/annotations/instances_train2017.json and ROOT/train2017 [annotations, images: file and folder below ROOT]
  paco-lvis     ROOT/annotations/paco_lvis_v1_train.json, whose file names begin with train2017/ [annotations, images]
  partimagenet  ROOT/annotations/train/train.json in COCO's form and ROOT/images/train, or ROOT/train.json and ROOT/train
                [annotations, images]
  pascal-part   ROOT/train.json in COCO's form (VLPart's) and ROOT/VOCdevkit/VOC2010/JPEGImages [annotations, images]
  ade20k        ROOT/images/training/NAME.jpg, ROOT/annotations/training/NAME.png and ROOT/objectInfo150.txt [split: validation]
  coco-stuff    ROOT/images/train2017/NAME.jpg, ROOT/annotations/train2017/NAME.png and ROOT/labels.txt [split: val2017]
  refcoco       ROOT/refcoco/instances.json and refs(unc).p, and ROOT/images/mscoco/images/train2014 [annotations, images, split: val, ...]
  refcoco+      as refcoco, in ROOT/refcoco+
  refcocog      as refcoco, in ROOT/refcocog with refs(umd).p
  refclef       as refcoco, in ROOT/refclef, and ROOT/images/saiapr_tc-12
  manifest      ROOT/manifest.csv with image, mask, label 1 and text, what the mask shows [split: the column's value]
 instruct
  anomaly-instruct  ROOT/instruct.jsonl, as agvas-instruct writes it [annotations: accepted.jsonl; modes: see agvas/training/README.md]
 anomaly
  real-iad      ROOT/realiad_jsons/CLASS.json and ROOT/realiad_1024/CLASS/... [annotations, images: folders below ROOT; split: train, test]
  goods-ad      ROOT/CLASS/train/good, ROOT/CLASS/test/good, ROOT/CLASS/test/KIND/NAME.* and ROOT/CLASS/ground_truth/KIND/NAME_mask.png or
                NAME.png, as MVTec AD [split: train, test]
  dtd-synthetic as goods-ad
  miad          as goods-ad
  crackforest   ROOT/image/NAME.jpg and ROOT/groundTruth/NAME.mat
  gc10-det      pictures in folders by defect below ROOT, and XML files in ROOT/lable, lable/lable, label/label or label
  zju-leaper    ROOT/Images/NUMBER.jpg, ROOT/Annotations/masks/NUMBER.png and ROOT/ImageSets/total.json [annotations: another list; split]
  manifest      ROOT/manifest.csv with image, mask, label (1 anomalous, 0 normal), optionally class, kind and split [split]
 conversation
  llava         ROOT/llava_instruct_150k.json and ROOT/train2017 [annotations, images]
every source also takes a weight; a group all or none
"""
