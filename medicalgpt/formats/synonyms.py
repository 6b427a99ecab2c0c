"""Words of patients and of documents for the same thing, so that "jab" finds "shot" without a model of embeddings.

Each line is a group; a term of a question counts as found if any of its group is in the passage.
"""

from collections import defaultdict

GROUPS_EN = """
jab shot vaccine vaccination injection immunisation immunization
flu influenza
fever temperature feverish hot
doctor physician gp
medicine drug medication pill tablet
pee urine urinate
poo stool feces faeces
belly stomach abdomen tummy
puke vomit vomiting throw nausea sick
pain hurt ache painful aching sore
child kid toddler baby infant son daughter
adult grown-up grownup
hypertension pressure
glucose sugar
diabetic diabetes
stitch suture thread sewn
cut wound injury
swelling swell swollen puffy
dizzy dizziness faint lightheaded
tired tiredness fatigue exhausted
itch itchy itching
bleed bleeding blood
breathe breathing breath
cough tickle tickly
appointment slot booking visit
book reserve booked
cancel call
cost fee charge charged price pay
bill invoice payment
free gratis
translate interpreter translator
wait waiting queue
open opening hour
close closed shut closing
phone telephone call ring dial extension
copy photocopy duplicate
record file chart
result report
renew repeat refill
collect pick fetch handed
throw bin dispose discard drop waste rubbish
fridge refrigerator cold
store keep storage stored
leaflet instruction
alcohol wine beer drink
eat food meal breakfast dinner lunch
swallow take taken
crush chew grind
split cut halve
water fluid liquid
shower wash bath
swim swimming pool
smoke smoking cigarette tobacco
exercise sport
sleep bed night
morning breakfast am
evening night
stop quit pause
begin start started
safe risk risky harm danger dangerous
allowed may permitted
emergency urgent 911 ambulance
dangerous serious severe
seizure fit convulsion
unconscious passed drowsy
stroke paralysis
heart cardiac
kidney renal
liver hepatic
infection infected contagious catch pass
antibiotic antibiotics
painkiller ibuprofen acetaminophen paracetamol
anaesthetic anesthetic numbing numb
ointment cream jelly
bandage dressing plaster
shoulder arm
leg knee limb
face cheek
head scalp
eye vision
ear hearing
tongue mouth lip
nose nasal
skin rash
pregnant pregnancy baby unborn
parking park car drive driving wheel
bus transport
lift elevator
wheelchair disabled
holiday journey travel trip flying flight
work job
money dollar
bit instalment installment
spare extra additional
old previous former
new another replacement
often frequently frequency every
number figure reading value level result
long duration last
high raised elevated above
low below under
hypo low
prick finger fingertip
strip strips
meter monitor device
side effect
allergy allergic
thyroid levothyroxine
chemo chemotherapy
swab test
mask masks
sunscreen sun spf
scar healing
yearly annual year
weekly week
daily day
"""
GROUPS_ZH = """
大夫 医生 医师
孩子 小孩 娃 宝宝 儿童 小朋友 小儿 婴儿 幼儿
老人 老年 长辈
发烧 发热 烧 体温 退烧 退热
退烧药 退热药
肚子 腹部 腹
拉肚子 腹泻
恶心 呕吐 吐
头痛 头疼
疼 痛
血压 高压 低压 收缩压 舒张压
血色素 血红蛋白
白血球 白细胞
转氨酶 丙氨酸氨基转移酶
潜血 隐血
尿样 小便 留尿 尿
大便 粪便
验血 抽血 采血 化验
单子 报告 化验单
看懂 解读 讲解
吃饭 早饭 晚饭 进食 空腹 饿
忌口 不要吃
喝水 白开水
喝酒 酒精 白酒 饮酒
卫生间 浴室 厕所
扔 丢 处理 回收 过期
过期 过了期 有效期
冰箱 冷藏 冷处
冻 冷冻 结冰 冰
滴眼液 眼药水
药片 药 药物 药品
整理 清理
揣 放 贴身
飞机 随身 托运
催吐 抠嗓子 吐
抽筋 抽搐 惊厥 抽
救护车 120 急救
急诊 急救
除颤器 AED 除颤
噎住 异物 气道 卡住
中风 口齿不清 嘴角
崴 扭伤 脚
烫 烫伤
狗咬 咬伤 狂犬
中暑 热射病 晒晕
煤气 一氧化碳 炭火 烧炭
触电 电源
鼻子 流鼻血 鼻血 鼻
出血 流血 血流
伤口 创口
冰敷 冷敷
挂号 取号 预约 号
退号 取消 取消预约 退
爽约 没去
迟到 晚到
电话 分机 拨
多少钱 收费 费用 押金 元
押金 押
免费 不收
停车 车
病房 住院 探视 看望
陪床 陪护 过夜
重症监护 ICU 监护
食堂 病号饭 供餐 餐
少盐 低盐 盐
复印 病案 病历
办 补办 建档
户口簿 身份证
看牙 口腔 牙
眼睛 眼科 眼
针灸 中医 中药
哪栋 楼 门
几楼 楼
下班 晚上 夜里
早上 早晨 起床
上厕所 排尿
胳膊 上臂 手臂 臂
胳膊弯 肘窝
静坐 安静 坐
抽烟 吸烟 烟
稳住 平稳 稳定
停掉 停药
借 借用
校准 校正
盖被子 捂汗 发汗 被子
勺子 量具 量杯
没尿 尿布 脱水
幼儿园 上学 幼儿
回来看 复诊
交替 轮流
标准 正常 参考范围
偏高 升高 增高
偏低 降低
漏 忘记
怀疑 提示
原因 为什么 引起
"""


def _read(text: str) -> dict[str, frozenset[str]]:
    known: dict[str, set[str]] = defaultdict(set)
    for line in text.strip().splitlines():
        for word in line.split():
            known[word] |= set(line.split())
    return {word: frozenset(group) for word, group in known.items()}


EN, ZH = _read(GROUPS_EN), _read(GROUPS_ZH)
