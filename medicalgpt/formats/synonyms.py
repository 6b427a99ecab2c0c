"""Everyday words and the words of documents for the same thing: "jab" and "injection", 发烧 and 体温.

Groups of words that may stand for each other, separated by semicolons. A word may be in several groups; the groups are
not joined. A Chinese word alone is one that is not to be read as single characters. They are of general use: homes,
shops, offices, schools, travel and above all health.
"""

from collections import defaultdict
from collections.abc import Callable

from medicalgpt.formats.terms import stem

ENGLISH_GROUPS = """
adult grown-up grownup; child kid toddler son daughter boy girl young little; baby infant newborn unborn toddler;
elderly old senior pensioner; friend guest visitor; doctor physician gp clinician;
employee staff worker colleague; boss manager director lead head;
person people human somebody someone anybody everybody patient; man male husband men; woman female wife women;
parent mother father guardian mum dad; tenant resident occupant; owner holder;
customer client reader member traveller passenger user; appointment slot booking visit;
book reserve booking reservation; reserve hold keep; cancel call withdraw; exchange swap change replace;
change alter modify switch; renew extend extension repeat refill reorder;
join register registration member membership enrol sign; apply ask request application;
cost price fee charge charged pay payment pound dollar euro cent; free gratis nothing cost charge;
discount reduction cheaper half; pay payment bill instalment paid; refund back return reimburse;
fine fee penalty charge owe; money pound dollar euro budget salary cash; salary wage pay; cash card;
insurance cover insured; buy purchase sale bought; open opening hour door; close closed shut closing lock;
lock locked shut; begin start started onset beginning starting; end finish stop over; stop quit pause give;
time hour clock long duration; duration long last lasts lasting; early ahead advance before soon;
late delay delayed; often frequently frequency every time daily weekly; once one single; twice two double;
yearly annual year; weekly week; daily day; monthly month; morning breakfast am; evening night tonight;
night overnight evening; weekend saturday sunday; fortnight week; breakfast meal morning;
dinner meal supper evening; lunch meal noon; meal food dish eat eating; eat food meal diet feed chew;
food feed diet eat; drink drinking fluid liquid beverage; water fluid liquid; juice drink;
alcohol wine beer alcoholic drink; coffee tea caffeine; phone telephone call ring dial extension number;
call ring phone telephone; ring call phone; tell inform report say notify; write written letter form note;
email message mail; answer respond reply response answered; complaint complain comment; question ask;
address live home; room place floor; building house; house home flat; flat home apartment; floor storey level;
lift elevator; stairs steps; toilet bathroom restroom washroom; door entrance gate; park parking car lot;
car drive driving vehicle wheel; drive driving car wheel; bus transport; train rail; bicycle bike cycle;
travel journey trip flight flying travelling holiday; holiday vacation leave journey trip off;
leave holiday vacation; trip journey travel; luggage baggage suitcase case bag; suitcase case luggage;
bed bunk couchette; job work office; office work desk; work job office; desk counter reception;
certificate note proof document; note certificate; file record chart document; copy photocopy;
print printout printing page; computer laptop pc; device meter monitor machine appliance;
machine device appliance; display screen show; plug socket power; power electricity; electricity power energy;
broken damaged defective faulty; repair fix mend service; torn wet damaged; damage harm damaged;
lose lost missing; lost lose forgot forget behind; forget forgotten forgot skip skipped miss missed;
steal stolen stole theft; find found; guarantee warranty guaranteed; receipt bill invoice;
throw bin dispose discard drop waste rubbish; rubbish waste bin; bring take carry pack along; carry bring take;
collect pick fetch handed; borrow loan lend take; keep store kept storage hold; store keep storage stored;
place put; put place lay goes; remove removed take out off removal taken; insert put;
clean wash cleaned cleaning; wash clean rinse washing; rinse wash; shower bath bathe wash;
bath soak shower bathe tub; swim swimming pool; dry drying pat; wet soak damp water; hot warm heat temperature;
cold cool chilly; cool cold; heat hot warm; freeze frozen ice; fridge refrigerator refrigerated; light lamp;
loud noise noisy silent quiet; quiet silent noise; talk speak speaking language;
language speak interpreter translate; translate interpreter translator; read reading; story tale;
test examination check exam swab; check checked inspect examine look review measure; review check;
measure reading take check; result report finding; reading value level number result figure;
value level number reading; level value; target aim goal; goal aim target;
high raised elevated above higher raise; low below under lower lows hypo; under below less low;
above over more higher exceed; more over above additional; maximum most highest limit up; minimum least at;
big large wide; large big; small little tiny; little small slightly; fast quick quickly rapid soon;
quickly fast soon within; slow slowly; strong severe heavy; bad severe serious worse; severe serious bad worse;
worse worst increase; increase rise raise grow; reduce lower decrease less; need must require necessary have;
allow allowed may permitted permission; allowed may permitted can; forbid forbidden banned prohibited never;
wear put; choose pick select; compare difference; different differ; same identical; normal usual typical usually;
usual normal typical; help assist helps ease; advice recommend advise; safe risk risky harm danger dangerous;
risk danger harm dangerous risky; danger dangerous risk serious harm;
dangerous serious severe emergency risk harm; emergency urgent ambulance 911 once; urgent emergency once day;
hospital emergency clinic; clinic practice surgery hospital; ill sick unwell illness;
sick ill unwell vomit nausea; illness disease condition sickness; disease illness condition; symptom sign;
sign symptom; reason why because cause; cause because reason due; effect cause affect;
medicine drug medication pill tablet; drug medicine medication tablet pill; pill tablet medicine capsule;
tablet pill medicine; painkiller ibuprofen acetaminophen paracetamol aspirin; acetaminophen paracetamol;
antibiotic antibiotics; antiviral antivirals; dose amount; prescription prescribe; pharmacy pharmacist chemist;
vaccine vaccination shot jab injection vaccinated immunisation;
vaccination vaccine vaccinated shot injection jab; jab shot vaccine injection vaccination;
injection shot inject needle; inject injection needle; needle lancet sharps; ointment cream salve;
cream ointment jelly; leaflet instruction manual; flu influenza; cold runny; fever temperature feverish hot;
temperature fever degree heat; shiver shivering; cough tickle tickly coughing; nose nasal; smell odour scent;
sneeze sneezing; throat swallow; swallow take throat; chew crush; crush chew grind; split cut halve break;
cut wound injury; wound cut injury sore; injury wound injured hurt; bleed bleeding blood; blood bleed bleeding;
bruise bruised yellow; swelling swell swollen puffy; rash spot spots; itch itchy itching scratch;
burn burnt burning scald; pain hurt ache painful aching sore pains; hurt pain painful injured;
ache pain aches painful; headache head; dizzy dizziness faint lightheaded; faint dizzy unconscious;
unconscious passed drowsy; sleepy drowsy tired; tired tiredness fatigue exhausted; sweaty sweating sweat;
tremble trembling shaking shake; shake shaking tremble; breathe breathing breath; breath breathe breathing;
vomit vomiting throw puke sick; diarrhoea diarrhea; belly stomach abdomen tummy; stomach belly abdomen;
pee urine urinate; poo stool faeces feces droppings; heart cardiac; kidney renal; liver hepatic;
eye vision sight; ear hearing; hearing ear; mouth lip tongue; tooth teeth dental; dentist dental; cheek face;
head scalp; leg knee limb; arm limb shoulder; finger fingertip toe; skin rash;
stitch suture thread sewn sew stitches; suture stitch thread; thread stitch suture;
dressing bandage plaster gauze; bandage dressing plaster; gauze swab; scar healing; heal healing heals;
stroke paralysis; seizure fit convulsion; diabetes diabetic sugar; diabetic diabetes; sugar glucose;
glucose sugar; hypo low; hypertension pressure; pressure hypertension; thyroid levothyroxine;
nitroglycerin angina; diuretic water; pregnant pregnancy unborn; infection infected contagious catch;
contagious pass infect infectious spread; catch infection infected pass; infect infection infected; virus viral;
germ bacteria; allergy allergic; allergic allergy; mask face; operation surgery operated;
sedation anaesthetic sedated numb; anaesthetic anesthetic numbing numb numbness; numb numbness feeling;
feeling numb numbness feel; smoke smoking cigarette tobacco; exercise sport gym training;
sport exercise gym lifting; gym sport exercise; course training class lesson; class course lesson;
child children; dog puppy hound; cat kitten; rabbit bunny; animal pet; pet animal; vet veterinarian;
castrate neuter neutered; lonely alone single; alone own single; adopt adoption; hay grass; claw nail;
disabled wheelchair handicapped; wheelchair disabled; blind guide; sleep bed asleep pillow; rest lie sit;
sit seat; lie lay; wake wakes waken; stand upright standing; lift raise heavy lifting; raise raised lift;
run running; walk walking; wait waiting queue; queue wait line; spare extra additional; additional extra further;
old previous former; new another fresh; fresh new; password code; internet online web website wifi;
online internet web website; app website online; form application; sure certain; colour color coloured;
black dark; dark black; room space; space room metre; weight weigh kilogram kg kilo; weigh weight;
kilo kg kilogram; metre meter; age old year; film dvd movie video; dvd film; game games; newspaper magazine;
detergent powder soap; softener fabric; filter sieve; mould mold; shirt clothes laundry; clothes laundry;
laundry clothes wash; trousers clothes; wool woollen; setting programme program; programme program cycle setting;
cycle programme; spin spinning; shake shakes shaking; wander walk walks move; puddle water floor;
burnt burning burn; expensive cost price up; charge charged fee fine pay missed;
provide provided included offer give; include included provided; membership member card; owe debt owes;
available reachable reach; reach call extension contact; bear stand tolerate heat;
wrong error fault trouble problem; trouble problem difficulty wrong; error fault trouble; touch eat eaten;
urgent emergency; sandwich food bread; bread toast; wine alcohol; chocolate sweet sugar; soup food; spit saliva;
saliva spit; tonight first day; swab gauze; coat clothes belongings property; forgot left lost behind;
belongings property luggage; decongestant pseudoephedrine; lancing lancet prick; prick lancing lancet; save keep;
bike bicycle; stay keep remain; parents parent guardian; alone unaccompanied adult guardian; teenager under age;
castrated neutered spayed; spayed neutered; crooked tilted bent; tilted crooked; bent crooked;
mobile phone smartphone; smartphone phone; couple pair two; pair two couple; handbag bag; glasses eye; sole only;
outside outdoors; indoors inside; parcel package box; package box pack; sign signal mark; storm weather;
kitchen cook; cook cooked boil; fry cook; petrol fuel; engine motor; motor engine; road street; street road;
pavement street; town city; country land; border customs; coach bus; ferry ship boat; boat ship;
plane aircraft flight flying; airport flight; passport identity; identity id passport; licence permit;
permit licence allowed; lawyer legal; police 911; fire burn; smell odour; taste flavour; bitter taste;
sweet sugar; salt sodium salty; fat fatty; fruit apple orange; vegetable greens; meat beef pork; fish seafood;
milk dairy; egg eggs; nut nuts; breastfeed nurse nursing; period menstruation; menstruation period;
contraception pill; weight obesity overweight; overweight weight heavy; depression mood; anxious anxiety;
sad depressed; memory forget; hair scalp; nail claw; back spine; neck throat; chest lung heart breast;
lung chest breathing; hip joint; joint knee hip; ankle foot leg; wrist hand arm; hand finger wrist; palm hand;
bone fracture; fracture bone broken; sprain sprained twist twisted; twist sprain; muscle muscles;
ache aches pain; cramp cramps; stiff stiffness; scan mri x-ray; x-ray xray scan; screening test check;
biopsy sample; sample swab specimen; urine pee sample; anaemia iron; cholesterol fat; clot thrombosis;
asthma breathing; cancer tumour chemotherapy; chemo chemotherapy cancer; tumour cancer; surgery operation;
bug virus infection; poison poisoning poisonous; overdose much many
"""
CHINESE_GROUPS = """
大夫 医生 医师; 医生 大夫 医师; 护士 护理; 孩子 小孩 娃 宝宝 儿童 小朋友 小儿 婴儿 幼儿 孙子 女儿 儿子;
婴儿 宝宝 婴 新生儿; 大人 成人 成年; 老人 老年 长辈 岁以上; 父母 家长 爸 妈; 家属 家里人 家人; 女的 女性 女;
男的 男性 男; 朋友 访客 客人; 异性 妈 爸; 病人 患者; 学生 本科生 研究生; 住户 业主;
发烧 发热 烧 体温 退烧 退热 高热; 退烧 退热; 退烧药 退热药 退热; 体温 发热 发烧 度; 高热 热性 发热;
抽筋 抽搐 惊厥 抽; 惊厥 抽搐 抽筋; 感冒 流感; 咳嗽 咳; 疼 痛; 疼痛 痛 疼; 头疼 头痛; 恶心 呕吐 吐;
吐 呕吐 催吐 恶心; 拉肚子 腹泻 拉稀 软便; 肚子 腹部 腹; 没力气 无力 没劲 乏力; 头晕 晕; 晕 头晕 晕针; 心慌 心跳;
喘 呼吸; 疹子 皮疹 疹; 肿 肿胀; 痒 瘙痒; 出血 流血 渗血 血; 流血 出血 血; 淌血 流血 出血; 烫 烫伤 烧伤; 烫伤 烫;
伤口 创口 伤; 崴 扭伤; 扭 扭伤; 噎住 异物 气道; 卡住 异物; 中风 口齿不清 嘴角; 中暑 热射病; 煤气 一氧化碳 炭火;
烧炭 炭火 一氧化碳; 触电 电源 电线; 骨折 断; 糖尿病 血糖; 血压 高压 低压 收缩压 舒张压; 高压 收缩压 血压;
低压 舒张压 血压; 血色素 血红蛋白; 白血球 白细胞; 转氨酶 丙氨酸氨基转移酶; 贫血 血红蛋白 缺铁; 潜血 隐血;
小便 尿 排尿; 验尿 留尿 尿; 尿样 小便 留尿 尿; 大便 粪便 屎; 屎 粪 便; 例假 月经; 验血 抽血 采血 化验; 采血 抽血;
抽血 采血 验血; 化验 检验 验; 化验单 报告 化验 单; 单子 报告 化验单; 检查 查 看 复查; 看病 就诊 就医 门诊 看;
就诊 看病 就医; 就医 看医生 去医院 看病; 看医生 就医 看病; 去医院 就医 看医生 急诊; 医院 就医; 急诊 急救 120;
救护车 120 急救; 急救 心肺复苏; 人工呼吸 吹气; 吹气 吹 人工呼吸; 按压 压; 除颤器 AED 除颤; 疫苗 针 打针 接种;
打针 疫苗 注射 针; 针 疫苗 针头; 打 注射 用; 针头 针; 药 药物 药品 用药; 药片 片 药; 药物 药 药品; 药箱 药;
吃药 服药 用药 服用; 喂药 吃药 服药; 服药 吃药; 滴眼液 眼药水; 过期 有效期 到期 逾期; 有效期 过期 到期;
勺子 量具 量杯; 量杯 量具; 喝酒 饮酒 酒; 啤酒 酒; 白酒 酒 酒精; 酒 酒精; 抽烟 吸烟 烟; 喝水 白开水 水;
开水 热水 烫; 吃饭 饭 餐 进食 吃东西 供餐; 早饭 早餐; 中饭 午饭 午餐; 晚饭 晚餐; 饭 餐; 病号饭 餐 食堂;
胃口 食欲; 忌口 不要吃 不吃; 饿 空腹; 空腹 不吃 饿; 少盐 低盐; 吃素 素; 扔 丢 投 处理 回收 垃圾;
丢 扔 遗失 丢失 弄丢; 丢了 遗失 弄丢 掉了; 掉了 丢 遗失; 弄丢 遗失 丢; 处理 扔 装 回收; 清理 整理 清; 整理 清理;
清 清理 清空; 洗 冲洗 清洗 擦; 冲 冲洗 洗; 擦 抹 涂; 抹 涂; 涂 抹 药膏; 漱口 含漱; 含 漱; 洗澡 浴室 沐浴 淋浴;
冰箱 冷藏; 冷藏 冰箱 冷处; 冻 冷冻 结冰; 冰 冷冻 结冰; 冰敷 冷敷 冰; 热敷 热毛巾; 凉水 自来水 冷水;
卫生间 浴室 厕所 洗手间; 厕所 卫生间 浴室 排尿; 上厕所 排尿; 被子 被褥; 捂 盖; 盖 捂 被子; 发汗 捂汗; 衣服 衣物;
挂号 取号 预约 号; 拿号 取号; 取号 拿号 挂号; 预约 订 约 提前; 订 预订 预约; 约 预约; 退号 取消 退; 退 取消 退还;
取消 退; 爽约 没去; 迟到 晚到 晚; 晚到 迟到; 晚归 晚 回来; 提前 早; 电话 分机 拨 打电话 内线; 打电话 电话 拨;
分机 电话 内线; 拨 打电话 分机; 打哪个 拨 分机 电话; 号码 电话 分机 内线 拨; 多少钱 收费 费用 元 价钱 费 块;
收费 费 元 收; 要钱 免费 收费 元; 交钱 免费 收费 元 交; 花 收 元 费; 钱 元 费 免费 收费; 免费 不收 不要钱 不收费;
押金 押 保证金; 押 押金; 优惠 打折 折 免票; 分期 期付; 退钱 退 退款 退还; 工钱 工资; 停车 车位 停; 开车 停车 车;
汽车 车; 车 车位 停车; 地库 地下; 电瓶车 电动自行车; 电钻 施工 噪声; 装修 施工; 陪床 陪护 过夜; 陪护 陪床;
看望 探视 探望; 探视 看望; 病房 病区 住院; 住院 病房 病区; 出院 退还; 重症 监护; 复印 病历; 病历 病案;
补办 补 重新办; 办 补办 办理 建档; 建档 办卡; 户口簿 户口; 身份证 证件; 证件 身份证; 卡 卡片; 门卡 门禁卡 门禁;
看牙 口腔; 牙 口腔; 眼睛 眼科 眼; 康复 康复科; 针灸 中医; 扎针 针灸 中医; 中药 中医; 哪栋 楼 门; 几楼 楼 层;
几层 楼 层; 楼 层; 下班 关 晚上 18:00; 上班 开门 值班; 开门 开放 开; 关门 关窗 关; 锁门 关门; 锁 关;
晚上 夜里 夜间 夜; 夜里 晚上 夜间; 半夜 夜里 夜间; 早上 早晨 上午 起床; 早晨 早上; 中午 午; 起床 起身;
站起来 起身 起床; 睡觉 睡 夜; 周末 周六 周日 星期; 星期 周; 周日 周末 周天; 周六 周末; 过年 春节;
当天 第一天 当日 24小时; 今天 当天; 每天 天天 一天 日; 天天 每天; 每月 每个月 一个月; 每年 一年 年; 一年 每年 年;
以后 后 之后; 以前 前 之前; 之前 以前 前; 之后 以后 后; 多久 小时 天 分钟 周 个月 时间; 最晚 之前 以前 至;
最早 开始 提前; 最多 不超过 以内 封顶; 至少 最少 以上; 超过 以上 高于 多于; 超重 超过; 低 低于 降低 偏低;
低于 以下 低; 高 高于 升高 偏高 超过; 偏高 升高 增高 高; 偏低 降低 低; 正常 标准 参考范围 范围; 上限 范围 至 到;
下限 范围 至 到; 标准 正常 参考; 胳膊 上臂 手臂 臂; 胳膊弯 肘窝; 臂围 上臂围; 粗 围; 嘴 口 牙; 嘴唇 口唇 唇;
嗓子 喉咙; 喉咙 嗓子; 鼻子 鼻; 脚 足; 腿 下肢 脚; 翘 跷; 手腕 腕; 脸 面; 器官 功能; 静坐 安静 坐; 聊天 说话;
说话 说; 手机 电话; 遍 次 回; 回 次 遍 顿; 几回 次 遍 顿; 几顿 顿; 轮流 交替; 轮着 交替; 交替 轮流; 隔 间隔 相隔;
间隔 隔; 停掉 停药 停; 停药 停; 减量 减; 稳住 平稳 稳定; 平稳 稳定; 换 更换 调换; 校准 校正; 借 借用 借期;
借用 借; 续借 续; 延 续借; 买 选用 购买; 选 选用 挑选; 打开 开封; 开封 打开 没开封; 还没打开 没开封; 揣 放 贴身;
放 存放 保存 保管; 存放 保存 放; 保存 存放 放; 托运 行李; 飞机 航空; 登船 上船; 上船 登船; 行李 包; 带 携带 带来;
带上 带; 上学 幼儿园 学校; 幼儿园 上学; 课 培训 班; 培训 课; 学 课 培训; 报名 登记; 登记 报; 建议 意见;
意见 建议 投诉; 投诉 意见; 原因 为什么 引起 因为; 为什么 因为 免得 以免 引起; 引起 原因 因为 可能;
严重 要紧 危险; 要紧 严重 马上 不要紧; 危险 严重; 后果 会 不能; 提示 说明 怀疑; 怀疑 提示; 说明 提示; 影响 干扰;
干扰 影响; 讲解 解读; 看懂 解读; 解读 讲解; 回来看 复诊; 复诊 回来看 复查; 机器 自助机; 贴身 口袋; 宝宝 婴儿;
脑子 智力; 烧坏 智力; 水泡 泡; 挑 挑破; 挑开 挑破; 撬 塞; 喂 吃 喝; 硬 逼 强; 口子 伤口; 狗 犬; 大型犬 狗;
猫 猫咪; 砂盆 猫砂盆; 猫粮 粮; 沙发 家具; 宿舍 寝室 房间; 寝室 宿舍 房间; 房间 寝室 间; 灯 熄灯 电;
吹头发 吹风机; 辞典 字典; 讨论室 研讨室; 图书 书; 坏了 损坏 报修; 报修 坏 修; 修 报修; 拆线 线; 线 缝线;
种植牙 种; 牙冠 冠; 冠 牙冠; 麻药 麻; 知觉 麻; 磨牙 牙垫; 游泳馆 游泳池; 游泳 游泳池; 健身 运动; 运动 剧烈;
糊味 焦味; 怪味 味道 异味; 异味 味道; 味 味道 异味; 长霉 发霉; 内衣 文胸; 文胸 内衣; 桶 筒; 屏幕 显示 代码;
显示 代码; 乱按 儿童锁; 上网 无线网 网; 甲板 船; 快递 快递员; 外卖 外卖员; 疑问 问题; 第二次 两次;
参加 跟 报名 团; 加 另 交; 半个钟头 分钟 半小时; 钟头 小时; 堵车 迟到; 狠 厉害; 变大 大; 到家 回家; 抱 摸;
赔 赔偿; 重 公斤 斤; 公斤 斤 重; 贵 价 元; 便宜 价 优惠; 拿 取 领; 领 取 拿 领取; 领取 领 取; 交上去 送到 交;
交 送 缴; 缴费 交; 水管 水 漏水; 爆 漏; 报 报修 报告; 憋 尿不出; 孙子 儿童 孩子; 爷爷 老人 病人; 奶奶 老人;
爸爸 父 家长; 妈妈 母 家长; 妈 家长 母; 老公 丈夫; 老婆 妻子; 吞 误服 咽; 误服 吃错 吞; 抠嗓子 催吐; 抠 催吐;
婴儿 婴 月的; 观察 等; 说不出话 说不了话; 噎 异物 卡; 救 急救 抢救; 敷 冷敷 热敷 冰; 小孩 儿童 孩子; 公交车 公交;
地铁 地铁站; 路 街; 身高 高; 体重 重 公斤; 个子 身高; 年纪 岁 年龄; 年龄 岁; 多大 岁; 女儿 孩子; 儿子 孩子;
幼儿 孩子; 怀孕 孕妇 妊娠; 孕妇 怀孕; 生孩子 分娩; 分娩 生孩子 生产; 手术 开刀; 开刀 手术; 过敏 皮疹; 皮肤 皮;
头发 发; 眼 眼睛; 耳朵 耳; 胃 胃口; 肝 肝脏; 肾 肾功能 肌酐; 心脏 心; 肺 呼吸; 骨头 骨; 关节 骨; 肌肉 肌;
感染 细菌 病毒; 细菌 感染; 病毒 感染; 癌 癌症 肿瘤; 癌症 癌 肿瘤; 心肌梗死 胸痛; 胸口疼 胸痛; 失眠 睡不着;
睡不着 失眠; 焦虑 烦躁; 胖 体重 肥胖; 减肥 减重; 素食 素; 甜 糖; 咸 盐; 盐 咸; 油 油腻; 喝茶 茶; 绿茶 茶;
茶 浓茶; 可乐 饮料; 吃鸡蛋 蛋; 鸡蛋 蛋; 牛奶 奶; 奶 牛奶; 水果 苹果; 空调 降温; 降温 退热; 凌晨 夜里; 白天 日;
假期 寒暑假 节假日; 节假日 假期 假日; 放假 节假日; 春节 过年; 旅馆 酒店 住宿; 住宿 住 宿舍; 洗手 手; 口罩 罩;
酒精 酒; 消毒 酒精 清洁; 包扎 包 盖; 纱布 布; 创可贴 敷料; 绷带 包扎; 拐杖 轮椅; 残疾人 无障碍 轮椅; 充电 电;
电池 电; 网络 网 无线网; 微信 小程序 手机; 小程序 手机; 网上 小程序 手机; 发票 票据; 票 船票; 船票 票; 门票 票;
保险 医保; 医保 保险 报销; 报销 医保 报; 余额 钱; 优惠 折 免; 毛巾; 密码; 咖啡
"""


def _read(text: str, form: Callable[[str], str]) -> dict[str, frozenset[str]]:
    """Each word, in its `form`, with all words of its groups, itself included."""
    known: dict[str, set[str]] = defaultdict(set)
    for group in text.split(";"):
        words = [form(word) for word in group.lower().split()]
        for word in words:
            known[word].update(words)
    return {word: frozenset(group) for word, group in known.items()}


# Stems of words, and words.
ENGLISH = _read(ENGLISH_GROUPS, stem)
CHINESE = _read(CHINESE_GROUPS, str)
